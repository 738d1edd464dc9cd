"""Rules on experts: which kernel takes which weights, on which ranks, with how many tokens."""

from __future__ import annotations

from fourfold.common.recipe.check.rules.case import Case, RoleCase, Said, rule

TOKENS = "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"
DISPATCH = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"


@rule(
    "megamoe-expert-parallel",
    "error",
    "models/deepseek_v4/nvidia/model.py and models/deepseek_v41/nvidia/model.py of vLLM raise when the model is built",
    vllm=">=0.32,<0.34",
)
def _expert_parallel(case: Case) -> Said:
    for role in case.roles:
        if role.get("moe-backend") == "deep_gemm_mega_moe" and role.parallel.expert == 1:
            yield (
                role.where("moe-backend"),
                "deep_gemm_mega_moe without expert parallelism ends on the GPUs; expected parallel.expert = "
                f"{role.parallel.tensor * role.parallel.data}, or another moe-backend",
            )


@rule(
    "megamoe-expert-format",
    "error",
    "models/deepseek_v4/nvidia/model.py of vLLM takes expert_dtype fp4 in the MXFP4 layout (vllm-project's recipe of "
    "DeepSeek-V4-Pro leaves it out on NVFP4); "
    "_BACKEND_SPECS in model_executor/layers/fused_moe/flashinfer_moe_ep.py",
    vllm=">=0.32,<0.34",
)
def _expert_format(case: Case) -> Said:
    takes = {
        "deep_gemm_mega_moe": ("mxfp4",),
        "flashinfer_moe_ep_mega_deep_gemm": ("mxfp4",),
        "flashinfer_moe_ep_cutedsl": ("mxfp4", "nvfp4"),
    }
    for role in case.roles:
        backend = role.text("moe-backend")
        if backend in takes and case.expert_format is not None and case.expert_format not in takes[backend]:
            yield (
                role.where("moe-backend"),
                f"{backend} on {case.expert_format} experts; expected {' or '.join(takes[backend])} experts: "
                f"choose another moe-backend for {case.card.id}",
            )


@rule(
    "megamoe-expert-format-sglang",
    "error",
    "sglang/srt/arg_groups/mega_moe_hook.py: SM100 computes MXFP4 and NVFP4 experts, SM90 block FP8",
    sglang="==0.5.23",
)
def _expert_format_sglang(case: Case) -> Said:
    takes = ("fp8_block128",) if str(case.sheet.compute_capability).startswith("9.") else ("mxfp4", "nvfp4")
    for role in case.roles:
        if _megamoe(role) and case.expert_format is not None and case.expert_format not in takes:
            yield (
                role.where("moe-a2a-backend"),
                f"megamoe on {case.expert_format} experts on {case.sheet.gpu}; expected {' or '.join(takes)} experts",
            )


@rule(
    "megamoe-tokens",
    "error",
    "validate_mega_moe_token_budget in sglang/srt/arg_groups/mega_moe_hook.py",
    sglang="==0.5.23",
)
def _tokens(case: Case) -> Said:
    for role in filter(_megamoe, case.roles):
        budget = role.variable(TOKENS, 8192)
        attention = role.parallel.tensor
        if role.name != "prefill":
            batch = role.number("cuda-graph-max-bs-decode")
            running = role.number("max-running-requests")
            if running:
                each = -(-(running // role.parallel.data) // attention) * attention
                batch = min(batch, each) if batch else each
            if batch * role.draft_tokens > budget:
                yield (
                    role.where(TOKENS, "env"),
                    f"{TOKENS}={budget}; a decoding step has {batch} requests of {role.draft_tokens} tokens on a rank: "
                    f"expected at least {batch * role.draft_tokens}, or a smaller max-running-requests",
                )
        if role.name != "decode" and role.get("chunked-prefill-size") is not None:
            chunk = role.number("chunked-prefill-size")
            each = -(-(chunk // role.parallel.data) // attention) * attention
            if chunk <= 0:
                yield role.where("chunked-prefill-size"), f"{chunk}; MegaMoE needs chunks, of a positive size"
            elif each > budget:
                yield (
                    role.where(TOKENS, "env"),
                    f"{TOKENS}={budget}; a chunk of {chunk} over {role.parallel.data} data-parallel ranks is {each} "
                    f"tokens: expected at least {each}, or a smaller chunked-prefill-size",
                )


@rule(
    "megamoe-w4a4",
    "warning",
    "enable_w4a4_mxfp4_megamoe in sglang/srt/arg_groups/fields/exec_.py",
    sglang="==0.5.23",
)
def _w4a4(case: Case) -> Said:
    for role in case.roles:
        four = role.get("enable-w4a4-mxfp4-megamoe") is True
        if four and not _megamoe(role):
            yield role.where("enable-w4a4-mxfp4-megamoe"), "does nothing without moe-a2a-backend: megamoe; set it"
        elif four and case.expert_format not in (None, "mxfp4"):
            yield (
                role.where("enable-w4a4-mxfp4-megamoe"),
                f"is for MXFP4 experts; those of {case.card.id} are {case.expert_format}: leave it out",
            )
        elif _megamoe(role) and not four and case.expert_format == "mxfp4" and case.sheet.peak_flops.get("fp4"):
            yield (
                role.where("moe-a2a-backend"),
                "megamoe computes MXFP4 experts with FP8 activations unless enable-w4a4-mxfp4-megamoe: true is set, "
                "which the published throughput has",
            )


@rule(
    "deepep-tokens",
    "error",
    "sglang/srt/layers/moe/token_dispatcher/deepep.py: the low-latency buffer holds that many tokens of a rank",
    sglang="==0.5.23",
)
def _deepep(case: Case) -> Said:
    for role in case.decoding:
        if role.get("moe-a2a-backend") != "deepep" or role.get("deepep-mode") == "normal":
            continue
        limit = role.variable(DISPATCH, 128)
        batch = role.number("max-running-requests") // role.parallel.data
        batch = min(batch or 1 << 30, role.number("cuda-graph-max-bs-decode") or 1 << 30)
        if batch < 1 << 30 and batch * role.draft_tokens > limit:
            needed = batch * role.draft_tokens
            fix = f"at least {needed}, or fewer requests" if needed <= 1024 else "fewer requests: 1024 tokens at most"
            yield (
                role.where(DISPATCH, "env"),
                f"{DISPATCH}={limit}; a decoding step has {batch} requests of {role.draft_tokens} tokens on a rank: "
                f"expected {fix}",
            )


@rule(
    "experts-divide",
    "error",
    "n_physical_experts % ep_size in models/deepseek_v4/nvidia/model.py of vLLM; num_experts % group size in "
    "sglang/srt/layers/moe/token_dispatcher/deepep.py and topk.py: both assert on the GPUs",
    vllm=">=0.32,<0.34",
    sglang="==0.5.23",
)
def _divide(case: Case) -> Said:
    for role in case.roles:
        if case.engine == "vllm":
            if role.get("moe-backend") != "deep_gemm_mega_moe":
                continue
            more = role.number("eplb-config.num_redundant_experts")
            how = "eplb-config.num_redundant_experts"
        else:
            if not _megamoe(role) and role.get("moe-a2a-backend") != "deepep":
                continue
            more, how = role.number("ep-num-redundant-experts"), "ep-num-redundant-experts"
        ranks, experts = role.parallel.expert, case.expert_count + more
        if case.expert_count and ranks > 1 and experts % ranks:
            yield (
                role.where() + ".parallel.expert",
                f"{experts} experts over {ranks} ranks; expected a divisor, or {how}: {more + -experts % ranks}",
            )


@rule(
    "moe-ep-small-batches",
    "note",
    "vllm-project/vllm#49636: 1.83 times DeepGEMM at 8192 tokens of a rank, equal up to 512",
    vllm=">=0.32,<0.34",
)
def _small_batches(case: Case) -> Said:
    pair = case.pair()
    if pair and pair[1].text("moe-backend").startswith("flashinfer_moe_ep"):
        tokens = pair[1].number("max-num-batched-tokens")
        if 0 < tokens <= 512:
            yield (
                pair[1].where("moe-backend"),
                f"{pair[1].get('moe-backend')} gains on large batches; decode here has at most {tokens} tokens",
            )


def _megamoe(role: RoleCase) -> bool:
    return role.engine == "sglang" and "megamoe" in (role.get("moe-a2a-backend"), role.get("moe-runner-backend"))

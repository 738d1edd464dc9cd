"""Rules on speculation: what the checkpoint can draft, how many tokens pay, what a simulation is worth."""

from __future__ import annotations

from collections.abc import Mapping

from fourfold.common.recipe.check.rules.case import Case, RoleCase, Said, rule

ENGINES = {"vllm": ">=0.32,<0.34", "sglang": "==0.5.23"}
# Mean accepted length with 1, 2, ... draft tokens (InferenceX golden_al_distribution, SPEED-Bench coding), the longest
# of its modes; by model_type and method.
GOLDEN: Mapping[tuple[str, str], tuple[float, ...]] = {
    ("deepseek_v4", "mtp"): (1.92, 2.61, 2.97, 3.00, 3.10),
    ("deepseek_v4", "dspark"): (1.94, 2.81, 3.58, 4.17, 4.74, 5.12, 5.24, 4.95),
    ("minimax_m3_vl", "eagle3"): (1.83, 2.46, 2.97, 3.29, 3.72, 3.76, 3.75, 3.93),  # minimaxm3_eagle3_gqa.yaml
}
GAIN = 0.11  # accepted tokens that one more draft token must bring to be worth its verification


@rule("draft-length", "warning", "InferenceX, golden_al_distribution (SPEED-Bench coding)", **ENGINES)
def _length(case: Case) -> Said:
    hybrid = case.plan.fourfold is not None and "mtp" in case.plan.fourfold.model_fields_set
    if hybrid:  # drafts from the text may be longer than the head's
        return
    for role in case.decoding:
        method = {"eagle": "mtp", "nextn": "mtp"}.get(role.speculation or "", role.speculation or "")
        lengths = GOLDEN.get((case.model_type, method))
        if lengths is None:
            continue
        best = 1 + max((i for i in range(1, len(lengths)) if lengths[i] - lengths[i - 1] >= GAIN), default=0)
        drafts = role.draft_tokens - 1
        if drafts > best:
            got = lengths[min(drafts, len(lengths)) - 1] - lengths[best - 1]
            yield (
                role.where(_option(role)),
                f"{drafts} draft tokens; beyond {best} the accepted length changes by {got:+.2f}: expected "
                f"at most {best}",
            )


@rule(
    "dspark-checkpoint",
    "error",
    "_handle_dspark in sglang/srt/arg_groups/speculative_hook.py; SpeculativeConfig in vllm/config/speculative.py",
    **ENGINES,
)
def _dspark(case: Case) -> Said:
    for role in case.roles:
        if role.speculation != "dspark" or case.card.draft == "dspark":
            continue
        draft = "speculative-config.model" if case.engine == "vllm" else "speculative-draft-model-path"
        if role.get(draft) is None:
            yield (
                role.where(_option(role)),
                f"DSpark on {case.card.id}, whose checkpoint drafts with {case.card.draft}; expected {draft}, "
                "or a checkpoint that holds a DSpark draft",
            )


@rule("dspark-runner", "error", "unsupported features of the V1 runner in vllm/config/vllm.py", vllm=">=0.32,<0.34")
def _runner(case: Case) -> Said:
    for role in case.roles:
        if role.speculation == "dspark" and role.env.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
            yield (
                role.where("VLLM_USE_V2_MODEL_RUNNER", "env"),
                "0 with DSpark, which only model runner V2 has; leave it out",
            )


@rule("dspark-lm-head", "error", "_handle_dspark in sglang/srt/arg_groups/speculative_hook.py", sglang="==0.5.23")
def _lm_head(case: Case) -> Said:
    for role in case.roles:
        if role.speculation != "dspark" or role.parallel.data == 1:
            continue
        if role.get("enable-dp-lm-head") is not True:
            yield role.where(_option(role)), "DSpark over data-parallel ranks needs enable-dp-lm-head: true; set it"
        verify = role.env.get("SGLANG_RAGGED_VERIFY_MODE", "static")
        if verify != "static" and role.get("moe-a2a-backend", "none") != "none":
            yield (
                role.where("SGLANG_RAGGED_VERIFY_MODE", "env"),
                f"{verify} with DSpark over data-parallel ranks; expected static",
            )


@rule(
    "dspark-apart-v41",
    "error",
    "validate_deepseek_v41_features in sglang/srt/arg_groups/deepseek_v4_hook.py",
    sglang="==0.5.23",
)
def _apart(case: Case) -> Said:
    if case.model_type != "deepseek_v41" or case.pair() is None:
        return
    for role in case.roles:
        if role.speculation is None:
            continue
        backend = role.get("disaggregation-transfer-backend", "mooncake")
        if backend not in ("mooncake", "nixl"):
            yield (
                role.where("disaggregation-transfer-backend"),
                f"{backend} with speculation on DeepSeek-V4.1; expected mooncake or nixl",
            )
        if role.parallel.context > 1:
            yield (
                role.where() + ".parallel.context",
                f"{role.parallel.context} with speculation on DeepSeek-V4.1, prefill and decode apart; expected 1",
            )


@rule("no-mtp-v41", "error", "DeepSeek V4.1 has no classic MTP draft: vllm/config/speculative.py", **ENGINES)
def _mtp_v41(case: Case) -> Said:
    for role in case.roles:
        if case.model_type == "deepseek_v41" and role.speculation not in (None, "dspark"):
            yield role.where(_option(role)), f"{role.speculation} on DeepSeek-V4.1, which drafts with dspark: use that"


@rule(
    "eagle-topk", "error", "apply_deepseek_v4_defaults in sglang/srt/arg_groups/deepseek_v4_hook.py", sglang="==0.5.23"
)
def _topk(case: Case) -> Said:
    for role in case.roles:
        topk = role.number("speculative-eagle-topk", 1)
        if case.deepseek_v4 and role.speculation in ("eagle", "nextn") and topk != 1:
            yield role.where("speculative-eagle-topk"), f"{topk} on DeepSeek-V4; expected 1"


@rule("draft-tokens-rewritten", "warning", "sglang/srt/arg_groups/speculative_hook.py adjusts it", sglang="==0.5.23")
def _rewritten(case: Case) -> Said:
    for role in case.roles:
        tokens, steps = role.number("speculative-num-draft-tokens"), role.number("speculative-num-steps")
        if tokens and steps and role.number("speculative-eagle-topk", 1) == 1 and tokens != steps + 1:
            yield (
                role.where("speculative-num-draft-tokens"),
                f"{tokens} becomes {steps + 1}, speculative-num-steps + 1, without a word; write {steps + 1}",
            )


@rule(
    "running-requests",
    "error",
    "sglang/srt/arg_groups/speculative_hook.py (48) and deepseek_v4_hook.py (256) set it where it is not",
    sglang="==0.5.23",
)
def _running(case: Case) -> Said:
    wanted = case.recipe.workload.concurrency
    for role in case.decoding:
        if role.get("max-running-requests") is not None or wanted is None:
            continue
        limit = 256 if case.model_type.startswith("deepseek_v4") else 48 if role.speculation else None
        if limit is not None and role.replicas * limit < wanted:
            yield (
                role.where(),
                f"max-running-requests is not set and becomes {limit}; {role.replicas} replica(s) cannot run "
                f"{wanted} requests: set it to {-(-wanted // role.replicas)} or more",
            )


@rule(
    "simulated-acceptance",
    "error",
    "rejection_sample_method in vllm/config/speculative.py; SGLANG_SIMULATE_ACC_LEN in sglang/srt/environ.py",
    **ENGINES,
)
def _simulated(case: Case) -> Said:
    declared = any(evidence.synthetic_acceptance for evidence in case.recipe.evidence)
    acceptance = case.recipe.speculation.acceptance if case.recipe.speculation else None
    if declared or (acceptance is not None and acceptance.synthetic):
        return
    for role in case.roles:
        if role.get("speculative-config.rejection_sample_method") == "synthetic":
            yield role.where("speculative-config"), _SIMULATED
        if role.env.get("SGLANG_SIMULATE_ACC_LEN", "-1").lstrip("+")[:1] not in ("-", ""):
            yield role.where("SGLANG_SIMULATE_ACC_LEN", "env"), _SIMULATED


_SIMULATED = (
    "acceptance is simulated, so answers are wrong and figures flatter (Dynamo measured about 36%); leave it out, or "
    "say synthetic_acceptance: true of the evidence"
)


def _option(role: RoleCase) -> str:
    return "speculative-config" if role.engine == "vllm" else "speculative-algorithm"

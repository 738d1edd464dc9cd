"""Rules on sizes: what cannot fit, what is too small for the workload. They only rule out; `recipe fit` computes."""

from __future__ import annotations

from fourfold.common.recipe.check.rules.case import Case, Said, rule

ENGINES = {"vllm": ">=0.32,<0.34", "sglang": "==0.5.23"}
LENGTH = {"vllm": "max-model-len", "sglang": "context-length"}
REQUESTS = {"vllm": "max-num-seqs", "sglang": "max-running-requests"}
GIB = 1 << 30
LAYOUT = 1.08  # loaded weights over the checkpoint's bytes, with what every rank holds


@rule(
    "weights-exceed-memory",
    "error",
    "the checkpoint's published size over all ranks; SemiAnalysisAI/InferenceX#2226 saw TP4 of DeepSeek-V4-Pro run out "
    "on GB200",
    **ENGINES,
)
def _weights(case: Case) -> Said:
    if case.card.published_bytes is None or not case.cuda:
        return
    for role in case.roles:
        each, holds = case.card.published_bytes / role.parallel.world, case.sheet.memory_bytes
        if each > 0.95 * holds:
            least = -(-case.card.published_bytes // int(0.85 * holds))
            yield (
                role.where() + ".parallel",
                f"{role.parallel.world} GPUs hold {each / GIB:.0f} GiB of weights each if every one is shared out, and "
                f"a {case.sheet.gpu} has {holds / GIB:.0f} GiB; expected at least {least} GPUs",
            )


@rule(
    "weights-leave-little",
    "warning",
    "observed on DeepSeek-V4-Pro: TP8 loaded 107.98 GiB where the checkpoint's share is 100.7, and DEP4 on GB300 left "
    "18 to 31 GB",
    **ENGINES,
)
def _little(case: Case) -> Said:
    if case.card.published_bytes is None or not case.cuda:
        return
    option = {"vllm": ("gpu-memory-utilization", 0.9), "sglang": ("mem-fraction-static", 0.9)}[case.engine]
    for role in case.roles:
        share = role.get(*option)
        usable = (float(share) if isinstance(share, (int, float)) else option[1]) * case.sheet.memory_bytes
        left = usable - LAYOUT * case.card.published_bytes / role.parallel.world
        if case.card.published_bytes / role.parallel.world <= 0.95 * case.sheet.memory_bytes and left < 16 * GIB:
            yield (
                role.where() + ".parallel",
                f"{role.parallel.world} GPUs: weights leave about {max(left, 0) / GIB:.0f} GiB of {option[0]} for the "
                "KV cache, graphs and state; expected more GPUs, or see fourfold recipe fit",
            )


@rule(
    "heads-divide",
    "error",
    "attention heads are shared out over tensor ranks; SGLang 0.5.23 resolves a configuration that breaks it",
    **ENGINES,
)
def _heads(case: Case) -> Said:
    heads = case.text.get("num_attention_heads")
    for role in case.roles:
        if isinstance(heads, int) and heads % role.parallel.tensor:
            yield (
                role.where() + ".parallel.tensor",
                f"{role.parallel.tensor} ranks share {heads} attention heads; expected a divisor",
            )


@rule("context-beyond-model", "error", "max_position_embeddings of the model's config.json", **ENGINES)
def _beyond(case: Case) -> Said:
    longest = case.text.get("max_position_embeddings")
    for role in case.roles:
        length = role.number(LENGTH[case.engine])
        if isinstance(longest, int) and length > longest:
            yield (
                role.where(LENGTH[case.engine]),
                f"{length} tokens; {case.card.id} knows {longest} positions: expected at most that",
            )


@rule("workload-beyond-context", "error", "the recipe's own workload", **ENGINES)
def _short(case: Case) -> Said:
    work = case.recipe.workload
    for role in case.roles:
        length = role.number(LENGTH[case.engine])
        needed = work.input_tokens + (work.output_tokens if role.name != "prefill" else 1)
        if 0 < length < needed:
            yield (
                role.where(LENGTH[case.engine]),
                f"{length} tokens; a request of the workload has {needed}: expected at least that",
            )


@rule("concurrency", "warning", "the recipe's own workload", **ENGINES)
def _concurrency(case: Case) -> Said:
    wanted, option = case.recipe.workload.concurrency, REQUESTS[case.engine]
    for role in case.decoding:
        each = role.number(option)
        servers = role.replicas * (
            role.parallel.data if case.engine == "vllm" else 1
        )  # SGLang counts all ranks at once
        if wanted is not None and 0 < each * servers < wanted:
            yield (
                role.where(option),
                f"{each}; {servers} of them run {each * servers} requests of the workload's {wanted} at a time: "
                f"expected {-(-wanted // servers)}, or a smaller workload.concurrency",
            )


@rule(
    "state-by-batched-tokens",
    "warning",
    "vllm-project/vllm#44376 (30 thousand tokens are 6.66 GiB on DeepSeek-V4-Pro) and #51041",
    vllm=">=0.32,<0.34",
)
def _state(case: Case) -> Said:
    if not case.deepseek_v4 or case.pair() is None:
        return
    for role in case.decoding:
        tokens = role.number("max-num-batched-tokens")
        if not tokens or tokens > 4096:
            yield (
                role.where("max-num-batched-tokens"),
                f"{tokens or 'not set'}; state of compressor and window is reserved for so many tokens: expected from "
                "256 to 1024 for decode",
            )


@rule(
    "decode-tokens",
    "note",
    "a decoding step counts every draft token: vllm/v1/core/sched/scheduler.py",
    vllm=">=0.32,<0.34",
)
def _decode_tokens(case: Case) -> Said:
    for role in case.decoding:
        requests, limit = role.number("max-num-seqs"), role.number("max-num-batched-tokens")
        needed = requests * role.draft_tokens
        if 0 < limit < needed:
            yield (
                role.where("max-num-batched-tokens"),
                f"{limit}; {requests} requests of {role.draft_tokens} tokens need {needed} for one step: fewer run",
            )
        captured = role.number("max-cudagraph-capture-size")
        if 0 < captured < min(needed, limit or needed):
            yield (
                role.where("max-cudagraph-capture-size"),
                f"{captured}; full batches of {min(needed, limit or needed)} tokens run without a CUDA graph",
            )

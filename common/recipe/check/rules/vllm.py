"""Rules on vLLM's own options."""

from __future__ import annotations

from fourfold.common.recipe.check.rules.case import Case, Said, rule

VERSIONS = ">=0.32,<0.34"
LARGE = 200 * 10**9  # bytes of a checkpoint whose first start takes longer than ten minutes


@rule("hybrid-lb", "error", "create_engine_config in vllm/engine/arg_utils.py", vllm=VERSIONS)
def _hybrid_lb(case: Case) -> Said:
    for role in case.roles:
        if role.get("data-parallel-hybrid-lb") is not True:
            continue
        where = role.where("data-parallel-hybrid-lb")
        if any("data-parallel-size-local" not in start.options for start in role.starts):
            yield where, "needs data-parallel-size-local, which one node has no use for; leave it out"
        elif any(start.options.get("headless") for start in role.starts):
            yield (
                where,
                "cannot be with headless nodes, which is how nodes after the first are started here; leave it out: "
                "the first node balances over all ranks",
            )


@rule(
    "retention-interval",
    "warning",
    "CacheConfig.prefix_cache_retention_interval in vllm/config/cache.py; InferenceX's agentic recipes: 0 to 12% hits "
    "without it",
    vllm=VERSIONS,
)
def _retention(case: Case) -> Said:
    wanted = {"deepseek_v4": 32768, "deepseek_v41": 1024}.get(case.model_type)
    if wanted is None or case.recipe.workload.kind == "fixed":
        return
    for role in case.roles:
        caches = role.get("enable-prefix-caching", True) and role.get("no-enable-prefix-caching") is not True
        if caches and not role.number("prefix-cache-retention-interval"):
            yield (
                role.where("prefix-cache-retention-interval"),
                "prefix-cache-retention-interval is not set: the window layers keep only the last checkpoint of a "
                f"prefix, and few requests find it; expected {wanted}",
            )


@rule(
    "block-size",
    "error",
    "get_supported_kernel_block_sizes of vllm/models/deepseek_v4/sparse_mla.py and deepseek_v41/sparse_mla.py",
    vllm=VERSIONS,
)
def _block_size(case: Case) -> Said:
    for role in case.roles:
        size = role.get("block-size")
        if case.deepseek_v4 and size is not None and size != 256:
            yield (
                role.where("block-size"),
                f"{size} on DeepSeek-V4, whose sparse attention has blocks of 256; write that",
            )
        elif case.model_type == "deepseek_v41" and size is not None:
            yield role.where("block-size"), f"{size} on DeepSeek-V4.1, which chooses its own; leave it out"


@rule(
    "ready-timeout",
    "warning",
    "VLLM_ENGINE_READY_TIMEOUT_S in vllm/envs.py is 600; published GB200 and GB300 recipes set 3600 (first starts take "
    "45 to 60 minutes)",
    vllm=VERSIONS,
)
def _ready(case: Case) -> Said:
    size = case.card.published_bytes or case.card.total_parameters * 0.5e9
    for role in case.roles:
        if size >= LARGE and case.cuda and role.variable("VLLM_ENGINE_READY_TIMEOUT_S", 600) < 1800:
            yield (
                role.where("VLLM_ENGINE_READY_TIMEOUT_S", "env"),
                f"VLLM_ENGINE_READY_TIMEOUT_S is {role.variable('VLLM_ENGINE_READY_TIMEOUT_S', 600)} seconds; the "
                f"first start of {case.card.id} takes longer: expected 3600",
            )


@rule(
    "expandable-segments",
    "error",
    "the check of KV transfers in vllm/config/vllm.py",
    vllm=VERSIONS,
)
def _segments(case: Case) -> Said:
    for role in case.roles:
        allocator = role.env.get("PYTORCH_CUDA_ALLOC_CONF", "")
        own = role.get("enable-sleep-mode") is True or role.get("enable-cumem-allocator") is True
        if role.connectors and "expandable_segments:True" in allocator and not own:
            yield (
                role.where("PYTORCH_CUDA_ALLOC_CONF", "env"),
                f"{allocator} moves memory that {role.connectors[0]} has registered; leave it out, or set "
                "enable-cumem-allocator: true",
            )


@rule(
    "symmetric-memory",
    "error",
    "InferenceX recipes of DeepSeek-V4-Pro-0813 on GB200 set it to 0: it ended the server",
    vllm=VERSIONS,
)
def _symmetric(case: Case) -> Said:
    for role in case.roles:
        on = role.env.get("VLLM_USE_NCCL_SYMM_MEM", "0") != "0"
        if on and case.card.id == "deepseek-v4-pro-0813" and case.sheet.gpu.startswith("GB200"):
            yield (
                role.where("VLLM_USE_NCCL_SYMM_MEM", "env"),
                "1 ends the server of DeepSeek-V4-Pro-0813 on GB200; write 0",
            )


@rule(
    "mnnvl-inside-a-tray",
    "warning",
    "vLLM recipe of DeepSeek-V4.1-Flash: NCCL_MNNVL_* broke tensor parallelism inside a tray",
    vllm=VERSIONS,
)
def _inside(case: Case) -> Said:
    for role in case.roles:
        name = next((name for name in role.env if name.startswith("NCCL_MNNVL")), None)
        if case.model_type == "deepseek_v41" and name and role.parallel.tensor > 1 and len(role.starts) == 1:
            yield role.where(name, "env"), f"{name} on DeepSeek-V4.1 with all ranks in a tray; leave it out"

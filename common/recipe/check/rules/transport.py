"""Rules on the way of the KV cache from prefill to decode: both ends must agree, and the wire must be the fast one."""

from __future__ import annotations

from fourfold.common.recipe.check.rules.case import Case, RoleCase, Said, rule

ENGINES = {"vllm": ">=0.32,<0.34", "sglang": "==0.5.23"}
FAST = ("rc", "dc", "ud", "ib", "all", "cuda_ipc")
SOURCE_UCX = (
    "InferenceX recipes for GB200 and GB300; without a fast transport the first token took 4663 ms, with it 479 ms"
)


@rule("ucx-transport", "error", SOURCE_UCX, **ENGINES)
def _ucx(case: Case) -> Said:
    if case.pair() is None or not case.cuda:
        return
    for role in case.roles:
        text = role.env.get("UCX_TLS")
        if text is None or text.startswith("^"):
            continue
        names = {name.strip() for name in text.split(",")}
        network = {name for name in names if name.startswith(FAST[:-2]) or name == "all"}
        where = role.where("UCX_TLS", "env")
        if not network and "cuda_ipc" not in names:
            yield (
                where,
                f"{text} leaves TCP for the KV cache; expected rc over InfiniBand, or cuda_ipc and "
                "UCX_CUDA_IPC_ENABLE_MNNVL=y inside a rack",
            )
        elif (
            not network
            and case.rack
            and role.env.get("UCX_CUDA_IPC_ENABLE_MNNVL", "n").lower() not in ("y", "yes", "1")
        ):
            yield where, f"{text} reaches no other node without UCX_CUDA_IPC_ENABLE_MNNVL=y; set it"
        elif not network and not case.rack:
            yield where, f"{text}; {case.sheet.id} has no NVLink between nodes: expected rc too"


@rule("ucx-control", "note", "DeepSeek-V4.1 recipes of vLLM keep tcp for control messages", **ENGINES)
def _control(case: Case) -> Said:
    for role in case.roles:
        text = role.env.get("UCX_TLS")
        if text and case.pair() and case.cuda and not text.startswith("^") and "tcp" not in text and "all" not in text:
            yield role.where("UCX_TLS", "env"), f"{text} without tcp, which carries control messages; add it"


@rule(
    "ucx-cache",
    "note",
    "Dynamo recipes for DeepSeek-V4 on GB200: the cache of registrations grows without bound",
    vllm=ENGINES["vllm"],
)
def _cache(case: Case) -> Said:
    for role in case.roles:
        nixl = any(name.startswith("Nixl") for name in role.connectors)
        if case.pair() and case.rack and nixl and "UCX_RCACHE_MAX_UNRELEASED" not in role.env:
            yield (
                role.where("UCX_RCACHE_MAX_UNRELEASED", "env"),
                "Nixl without UCX_RCACHE_MAX_UNRELEASED; published recipes set 1024",
            )


@rule(
    "nvlink-kv-memory",
    "warning",
    "InferenceX recipes for GB200 and GB300; enable_sleep_mode and enable_cumem_allocator in vllm/config/model.py",
    vllm=ENGINES["vllm"],
)
def _kv_memory(case: Case) -> Said:
    if case.pair() is None or not case.rack:
        return
    for role in case.roles:
        nixl = any(name.startswith("Nixl") for name in role.connectors)
        own = role.get("enable-sleep-mode") is True or role.get("enable-cumem-allocator") is True
        if nixl and not own and "cuda_ipc" in role.env.get("UCX_TLS", ""):
            yield (
                role.where("kv-transfer-config"),
                "NVLink between nodes needs memory allocated with CUDA VMM; set enable-sleep-mode: true or "
                "enable-cumem-allocator: true",
            )


@rule(
    "mooncake-nvlink",
    "warning",
    "Recipes of InferenceX and Dynamo: without InfiniBand it falls back to TCP; garbled KV was reported",
    **ENGINES,
)
def _mooncake(case: Case) -> Said:
    if case.pair() is None or not case.rack:
        return
    for role in case.roles:
        if case.engine == "vllm":
            uses = "MooncakeConnector" in role.connectors
        else:
            uses = role.get("disaggregation-transfer-backend", "mooncake") == "mooncake"
        if not uses:
            continue
        names = ["MC_FORCE_MNNVL"] + ["SGLANG_MOONCAKE_CUSTOM_MEM_POOL"] * (case.engine == "sglang")
        for name in names:
            if role.env.get(name, "0").lower() in ("0", "false", ""):
                yield role.where(name, "env"), f"Mooncake on {case.sheet.id} without {name}; set it to 1, or to True"


@rule(
    "mooncake-hashes",
    "error",
    "resolve_none_hash_seed in vllm/v1/core/kv_cache_utils.py: SHA-256 has a fixed seed, xxhash a random one",
    vllm=ENGINES["vllm"],
)
def _hashes(case: Case) -> Said:
    for role in case.roles:
        algorithm = role.text("prefix-caching-hash-algo")
        shared = "MooncakeStoreConnector" in role.connectors and algorithm.startswith("xxhash")
        if shared and "PYTHONHASHSEED" not in role.env:
            yield (
                role.where("prefix-caching-hash-algo"),
                f"{algorithm} and MooncakeStoreConnector: no process finds another's blocks; set PYTHONHASHSEED, or "
                "leave the algorithm out",
            )


@rule(
    "kv-connector",
    "error",
    "vllm/config/kv_transfer.py: without it a server computes its own prefill",
    vllm=ENGINES["vllm"],
)
def _connector(case: Case) -> Said:
    if case.pair() is None:
        return
    wrong = {"prefill": "kv_consumer", "decode": "kv_producer"}
    for role in case.roles:
        if not role.connectors:
            yield role.where(), "has no kv-transfer-config, so no KV cache moves; set its kv_connector and kv_role"
        elif role.get("kv-transfer-config.kv_role") == wrong.get(role.name):
            yield (
                role.where("kv-transfer-config"),
                f"kv_role {wrong[role.name]} for {role.name}; expected kv_both, or the other one",
            )


@rule(
    "kv-load-failure",
    "warning",
    "kv_load_failure_policy in vllm/config/kv_transfer.py; a failed transfer answers 200 with content null",
    vllm=ENGINES["vllm"],
)
def _failure(case: Case) -> Said:
    pair = case.pair()
    if pair and pair[1].get("kv-transfer-config.kv_load_failure_policy") == "recompute":
        yield (
            pair[1].where("kv-transfer-config"),
            "kv_load_failure_policy recompute hides failed transfers as slow answers of a server that is not sized for "
            "prefill; expected fail, and a benchmark that counts null answers",
        )


@rule(
    "kv-handshake",
    "error",
    "compute_nixl_compatibility_hash in vllm/distributed/kv_transfer/kv_connector/v1/nixl/metadata.py, and the block "
    "lengths that base_worker.py compares (those of an indexer follow its dtype)",
    vllm=ENGINES["vllm"],
)
def _handshake(case: Case) -> Said:
    pair = case.pair()
    if pair is None or not all(any(c.startswith("Nixl") for c in role.connectors) for role in pair):
        return
    extra = [role.get("kv-transfer-config.kv_connector_extra_config") for role in pair]
    if any(isinstance(given, dict) and given.get("enforce_handshake_compat") is False for given in extra):
        return
    for option in (
        "kv-cache-dtype",
        "dtype",
        "attention-config.backend",
        "attention-config.indexer_kv_dtype",
        "attention-backend",
        "disable-hybrid-kv-cache-manager",
        "speculative-config.method",
        "speculative-config.model",
    ):
        yield from _differ(pair, option, "the servers refuse each other's KV cache: write the same in both")


@rule("kv-block-size", "warning", "_validate_remote_agent_handshake in vLLM's Nixl worker", vllm=ENGINES["vllm"])
def _blocks(case: Case) -> Said:
    pair = case.pair()
    if pair:
        yield from _differ(pair, "block-size", "blocks are then cut anew on the way: write the same in both")


@rule(
    "kv-handshake-sglang",
    "error",
    "sglang/srt/disaggregation/common/conn.py compares page size and KV dtype when a server registers",
    sglang=ENGINES["sglang"],
)
def _handshake_sglang(case: Case) -> Said:
    pair = case.pair()
    if pair:
        for option in ("kv-cache-dtype", "page-size", "disaggregation-transfer-backend"):
            yield from _differ(pair, option, "the servers refuse each other: write the same in both")


def _differ(pair: tuple[RoleCase, RoleCase], option: str, why: str) -> Said:
    prefill, decode = (role.get(option) for role in pair)
    if prefill != decode and not all(value in (None, "auto") for value in (prefill, decode)):
        yield (
            pair[1].where(option.partition(".")[0]),
            f"{option} is {_shown(prefill)} in prefill and {_shown(decode)} in decode; {why}",
        )


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)

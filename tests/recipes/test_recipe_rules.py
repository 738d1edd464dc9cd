"""Every lint rule: a recipe that trips it, and the same recipe without the flaw, which does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from fourfold.common.recipe.check.result import Finding
from fourfold.common.recipe.check.rules import RULES, findings
from fourfold.common.recipe.loading import Catalogue, merged, parse
from fourfold.common.recipe.schema import Recipe

CATALOGUE = Catalogue()
VERSIONS = {"vllm": "0.32.0", "sglang": "0.5.23"}
TOKENS = "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"

# DeepSeek-V4-Pro on GB300, prefill and decode apart, on which no rule has anything to say.
BASE: dict[str, Any] = {
    "schema": "fourfold/recipe/1",
    "id": "test/base",
    "title": "base",
    "model": "deepseek-v4-pro",
    "hardware": "gb300-nvl72",
    "workload": {"kind": "fixed", "input_tokens": 8192, "output_tokens": 1024, "concurrency": 512},
    "engines": {
        "vllm": {
            "versions": ">=0.32,<0.34",
            "args": {
                "kv-cache-dtype": "fp8",
                "block-size": 256,
                "attention-config": {"indexer_kv_dtype": "mxfp4"},
                "moe-backend": "deep_gemm_mega_moe",
                "speculative-config": {"method": "mtp", "num_speculative_tokens": 2},
                "max-model-len": 16384,
                "enable-sleep-mode": True,
                "kv-transfer-config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
            },
            "env": {
                "UCX_TLS": "cuda_copy,cuda_ipc,tcp",
                "UCX_CUDA_IPC_ENABLE_MNNVL": "y",
                "UCX_RCACHE_MAX_UNRELEASED": 1024,
                "VLLM_ENGINE_READY_TIMEOUT_S": 3600,
            },
            "roles": {
                "prefill": {
                    "parallel": {"data": 4, "expert": 4},
                    "args": {"max-num-seqs": 16, "max-num-batched-tokens": 16384},
                },
                "decode": {
                    "parallel": {"data": 8, "expert": 8},
                    "args": {"max-num-seqs": 64, "max-num-batched-tokens": 1024},
                },
            },
        },
        "sglang": {
            "versions": "==0.5.23",
            "args": {
                "moe-a2a-backend": "megamoe",
                "enable-w4a4-mxfp4-megamoe": True,
                "disaggregation-transfer-backend": "mooncake",
            },
            "env": {
                "MC_FORCE_MNNVL": 1,
                "SGLANG_MOONCAKE_CUSTOM_MEM_POOL": "True",
                "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": 100000,
                "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": 100000,
            },
            "roles": {
                "prefill": {
                    "parallel": {"data": 4, "expert": 4},
                    "args": {"chunked-prefill-size": 32768, "max-running-requests": 256},
                    "env": {TOKENS: 8192},
                },
                "decode": {
                    "parallel": {"data": 16, "expert": 16},
                    "args": {
                        "max-running-requests": 2048,
                        "cuda-graph-max-bs-decode": 128,
                        "speculative-algorithm": "EAGLE",
                        "speculative-num-steps": 3,
                        "speculative-eagle-topk": 1,
                        "speculative-num-draft-tokens": 4,
                    },
                    "env": {TOKENS: 1280},
                },
            },
        },
    },
}


def engine(name: str, args: Any = None, env: Any = None, **roles: Any) -> dict[str, Any]:
    """An override of one engine's part."""
    return {"engines": {name: {"args": args or {}, "env": env or {}, "roles": roles}}}


def vllm(args: Any = None, env: Any = None, **roles: Any) -> dict[str, Any]:
    return engine("vllm", args, env, **roles)


def sglang(args: Any = None, env: Any = None, **roles: Any) -> dict[str, Any]:
    return engine("sglang", args, env, **roles)


def decode(args: Any = None, env: Any = None, **parallel: int) -> dict[str, Any]:
    return {"decode": {"args": args or {}, "env": env or {}, "parallel": parallel}}


def work(**changes: Any) -> dict[str, Any]:
    return {"workload": changes}


V41 = {"model": "deepseek-v4.1-flash"}
DSPARK = {"speculative-config": {"method": "dspark", "num_speculative_tokens": 5}}
SG_DSPARK = {
    "speculative-algorithm": "DSPARK",
    "speculative-dspark-block-size": 5,
    "speculative-num-steps": None,
    "speculative-eagle-topk": None,
    "speculative-num-draft-tokens": None,
}
NVFP4 = {"model": "deepseek-v4-pro-nvfp4"}
V32 = {"model": "deepseek-v3.2-nvfp4"}
GB200 = {"hardware": "gb200-nvl72"}
AGENTIC = work(kind="agentic")
PARALLEL_8 = {"prefill": {"parallel": {"data": 8, "expert": 8}}}

# rule, engine, what the recipe is besides the base, the flaw, part of the message
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    ("megamoe-expert-parallel", "vllm", {}, vllm(**decode(expert=1)), "parallel.expert = 8"),
    ("megamoe-expert-format", "vllm", vllm({"moe-backend": "auto"}) | NVFP4,
     vllm({"moe-backend": "deep_gemm_mega_moe"}),
     "on nvfp4 experts; expected mxfp4"),
    ("megamoe-expert-format-sglang", "sglang", sglang({"enable-w4a4-mxfp4-megamoe": None}),
     {"hardware": "h200"} | sglang(prefill={"parallel": {"data": 8, "expert": 8}}, **decode(data=8, expert=8)),
     "expected fp8_block128"),
    ("megamoe-tokens", "sglang", {}, sglang(**decode(env={TOKENS: 500})), "expected at least 512"),
    ("megamoe-tokens", "sglang", {}, sglang(prefill={"args": {"chunked-prefill-size": 65536}}),
     "expected at least 16384"),
    ("megamoe-tokens", "sglang", {}, sglang(prefill={"args": {"chunked-prefill-size": -1}}), "needs chunks"),
    ("megamoe-w4a4", "sglang", {}, sglang({"enable-w4a4-mxfp4-megamoe": None}), "FP8 activations"),
    ("megamoe-w4a4", "sglang", {}, sglang({"moe-a2a-backend": None}), "does nothing without"),
    ("megamoe-w4a4", "sglang", NVFP4 | sglang({"enable-w4a4-mxfp4-megamoe": None}),
     sglang({"enable-w4a4-mxfp4-megamoe": True}), "those of deepseek-v4-pro-nvfp4 are nvfp4"),
    ("deepep-tokens", "sglang",
     sglang({"moe-a2a-backend": "deepep", "enable-w4a4-mxfp4-megamoe": None},
            {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": 512}),
     sglang({}, {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": None}),
     "=128; a decoding step has 128 requests of 4"),
    ("experts-divide", "sglang", sglang(**decode({"max-running-requests": 4000}, data=32, expert=32)),
     sglang(**decode(data=40, expert=40)), "expected a divisor, or ep-num-redundant-experts: 16"),
    ("experts-divide", "vllm", {}, vllm(**decode(data=20, expert=20)), "eplb-config.num_redundant_experts: 16"),
    ("moe-ep-small-batches", "vllm", vllm({"moe-backend": "flashinfer_moe_ep_cutedsl"}),
     vllm(**decode({"max-num-batched-tokens": 512})), "gains on large batches"),
    ("draft-length", "vllm", {}, vllm({"speculative-config": {"num_speculative_tokens": 5}}), "beyond 3"),
    ("draft-length", "sglang", {}, sglang(**decode({"speculative-num-steps": 4, "speculative-num-draft-tokens": 5})),
     "4 draft tokens; beyond 3"),
    ("dspark-checkpoint", "vllm", {"model": "deepseek-v4-pro-0813"} | vllm(DSPARK), {"model": "deepseek-v4-pro"},
     "whose checkpoint drafts with mtp"),
    ("dspark-checkpoint", "sglang", {}, sglang({"enable-dp-lm-head": True}, **decode(SG_DSPARK)),
     "expected speculative-draft-model-path"),
    ("dspark-runner", "vllm", {"model": "deepseek-v4-pro-0813"} | vllm(DSPARK), vllm({},
     {"VLLM_USE_V2_MODEL_RUNNER": 0}),
     "model runner V2"),
    ("dspark-lm-head", "sglang",
     {"model": "deepseek-v4-pro-0813"} | sglang({"enable-dp-lm-head": True}, **decode(SG_DSPARK)),
     sglang({"enable-dp-lm-head": None}), "set it"),
    ("dspark-lm-head", "sglang",
     {"model": "deepseek-v4-pro-0813"} | sglang({"enable-dp-lm-head": True}, **decode(SG_DSPARK)),
     sglang({}, {"SGLANG_RAGGED_VERIFY_MODE": "compact"}), "expected static"),
    ("dspark-apart-v41", "sglang", V41 | sglang({"enable-dp-lm-head": True}, **decode(SG_DSPARK)),
     sglang({"disaggregation-transfer-backend": "mori"}), "expected mooncake or nixl"),
    ("no-mtp-v41", "vllm", V41 | vllm(DSPARK), vllm({"speculative-config": {"method": "mtp"}}), "use that"),
    ("eagle-topk", "sglang", {}, sglang(**decode({"speculative-eagle-topk": 2})), "expected 1"),
    ("draft-tokens-rewritten", "sglang", {}, sglang(**decode({"speculative-num-draft-tokens": 9})), "becomes 4"),
    ("running-requests", "sglang", {}, sglang(**decode({"max-running-requests": None})), "becomes 256"),
    ("running-requests", "sglang", V32 | sglang({"enable-w4a4-mxfp4-megamoe": None}),
     sglang(**decode({"max-running-requests": None})), "becomes 48"),
    ("simulated-acceptance", "vllm", {}, vllm({"speculative-config": {"rejection_sample_method": "synthetic"}}),
     "acceptance is simulated"),
    ("simulated-acceptance", "sglang", {}, sglang({}, {"SGLANG_SIMULATE_ACC_LEN": 2.49}), "acceptance is simulated"),
    ("weights-exceed-memory", "vllm", vllm(**PARALLEL_8) | GB200, vllm(prefill={"parallel": {"data": 4, "expert": 4}}),
     "201 GiB of weights"),
    ("weights-leave-little", "vllm", {}, vllm({"gpu-memory-utilization": 0.8}), "weights leave about 5 GiB"),
    ("weights-leave-little", "sglang", {}, sglang({"mem-fraction-static": 0.8}), "of mem-fraction-static"),
    ("heads-divide", "sglang", {}, sglang(**decode(tensor=3, data=4, expert=12)), "3 ranks share 128"),
    ("context-beyond-model", "vllm", {}, vllm({"max-model-len": 2097152}), "knows 1048576"),
    ("workload-beyond-context", "vllm", {}, vllm({"max-model-len": 8192}), "has 9216"),
    ("workload-beyond-context", "sglang", sglang({"context-length": 9216}), work(output_tokens=2048), "has 10240"),
    ("concurrency", "vllm", {}, work(concurrency=513), "expected 65"),
    ("concurrency", "sglang", {}, work(concurrency=4096), "expected 4096"),
    ("state-by-batched-tokens", "vllm", {}, vllm(**decode({"max-num-batched-tokens": 30000})), "30000; state"),
    ("state-by-batched-tokens", "vllm", {}, vllm(**decode({"max-num-batched-tokens": None})), "not set"),
    ("decode-tokens", "vllm", {}, vllm(**decode({"max-num-seqs": 512})), "need 1536"),
    ("decode-tokens", "vllm", {}, vllm(**decode({"max-cudagraph-capture-size": 64})), "full batches of 192"),
    ("hybrid-lb", "vllm", {}, vllm(**decode({"data-parallel-hybrid-lb": True})), "headless"),
    ("hybrid-lb", "vllm", {}, vllm(prefill={"args": {"data-parallel-hybrid-lb": True}}), "data-parallel-size-local"),
    ("retention-interval", "vllm", AGENTIC | vllm({"prefix-cache-retention-interval": 32768}),
     vllm({"prefix-cache-retention-interval": None}), "expected 32768"),
    ("block-size", "vllm", {}, vllm({"block-size": 64}), "blocks of 256"),
    ("block-size", "vllm", vllm({"block-size": None} | DSPARK) | V41, vllm({"block-size": 128}), "leave it out"),
    ("ready-timeout", "vllm", {}, vllm({}, {"VLLM_ENGINE_READY_TIMEOUT_S": None}), "is 600 seconds"),
    ("expandable-segments", "vllm", vllm({"enable-sleep-mode": None}),
     vllm({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}), "NixlConnector has registered"),
    ("symmetric-memory", "vllm", {"model": "deepseek-v4-pro-0813"} | GB200 | vllm({}, {"VLLM_USE_NCCL_SYMM_MEM": 0}),
     vllm({}, {"VLLM_USE_NCCL_SYMM_MEM": 1}), "write 0"),
    ("mnnvl-inside-a-tray", "vllm", V41 | vllm(**decode(tensor=4, data=1, expert=4)), vllm({},
     {"NCCL_MNNVL_ENABLE": 1}),
     "leave it out"),
    ("page-size-rewritten", "sglang", {}, sglang({"page-size": 64}), "becomes 256"),
    ("mamba-no-buffer", "sglang",
     sglang({"mamba-radix-cache-strategy": "no_buffer", "disable-overlap-schedule": True, "page-size": 1}) | V32,
     sglang({"disable-overlap-schedule": None, "attention-backend": "trtllm_mha"}), "another attention-backend"),
    ("handshake-timeouts", "sglang", {}, sglang({}, {"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": None}), "is 300 seconds"),
    ("ucx-transport", "vllm", {}, vllm({}, {"UCX_TLS": "tcp,self"}), "leaves TCP"),
    ("ucx-transport", "vllm", {}, vllm({}, {"UCX_CUDA_IPC_ENABLE_MNNVL": None}), "reaches no other node"),
    ("ucx-transport", "sglang", sglang({}, {"UCX_TLS": "rc,cuda_copy,tcp"}), sglang({}, {"UCX_TLS": "cuda_copy,tcp"}),
     "leaves TCP"),
    ("ucx-control", "vllm", {}, vllm({}, {"UCX_TLS": "cuda_copy,cuda_ipc"}), "add it"),
    ("ucx-cache", "vllm", {}, vllm({}, {"UCX_RCACHE_MAX_UNRELEASED": None}), "set 1024"),
    ("nvlink-kv-memory", "vllm", {}, vllm({"enable-sleep-mode": None}), "CUDA VMM"),
    ("mooncake-nvlink", "sglang", {}, sglang({}, {"MC_FORCE_MNNVL": None}), "without MC_FORCE_MNNVL"),
    ("mooncake-hashes", "vllm",
     vllm({"kv-transfer-config": {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [
         {"kv_connector": "NixlConnector"}, {"kv_connector": "MooncakeStoreConnector"}]}}}),
     vllm({"prefix-caching-hash-algo": "xxhash"}), "set PYTHONHASHSEED"),
    ("kv-connector", "vllm", {}, vllm({"kv-transfer-config": None}), "no KV cache moves"),
    ("kv-connector", "vllm", {}, vllm(prefill={"args": {"kv-transfer-config": {"kv_role": "kv_consumer",
     "kv_connector": "NixlConnector"}}}), "kv_consumer for prefill"),
    ("kv-load-failure", "vllm", {}, vllm({"kv-transfer-config": {"kv_load_failure_policy": "recompute"}}),
     "expected fail"),
    ("kv-handshake", "vllm", {}, vllm(**decode({"kv-cache-dtype": "auto"})),
     "kv-cache-dtype is fp8 in prefill and auto"),
    ("kv-handshake", "vllm", vllm({"attention-config": {"indexer_kv_dtype": None}}),
     vllm(**decode({"attention-config": {"indexer_kv_dtype": "mxfp4"}})), "indexer_kv_dtype is not set in prefill"),
    ("kv-block-size", "vllm", V32 | vllm({"moe-backend": "auto"}), vllm(**decode({"block-size": 64})),
     "block-size is 256 in prefill"),
    ("kv-handshake-sglang", "sglang", {}, sglang(**decode({"page-size": 256})),
     "page-size is not set in prefill and 256"),
]  # fmt: skip


def found(data: Mapping[str, Any], name: str, version: str | None = None) -> list[Finding]:
    """What the rules say of a recipe's mapping."""
    recipe = parse(Recipe, dict(data), "test")
    return findings(
        recipe, name, version or VERSIONS[name], CATALOGUE.model(recipe.model), CATALOGUE.hardware(recipe.hardware)
    )


def ids(lines: list[Finding]) -> set[str]:
    return {line.message.partition(":")[0] for line in lines}


@pytest.mark.parametrize("name", VERSIONS)
def test_the_base_is_clean(name: str) -> None:
    assert found(BASE, name) == []


@pytest.mark.parametrize(("rule", "name", "context", "flaw", "says"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_rule(rule: str, name: str, context: dict[str, Any], flaw: dict[str, Any], says: str) -> None:
    sound = merged(BASE, context)
    assert rule not in ids(found(sound, name))
    lines = [line for line in found(merged(sound, flaw), name) if line.message.startswith(rule + ":")]
    assert lines and any(says in line.message for line in lines), lines
    for line in lines:
        assert line.level == 4 and line.source and line.where.startswith(f"engines.{name}")
        assert line.engine == f"{name} {VERSIONS[name]}" and len(line.message) > len(rule) + 20


def test_every_rule_has_a_case() -> None:
    assert {rule.id for rule in RULES} == {case[0] for case in CASES}
    assert len({rule.id for rule in RULES}) == len(RULES)
    for entry in RULES:
        for name in entry.versions:
            own = [case for case in CASES if case[0] == entry.id]
            assert own, (entry.id, name)


def test_rules_are_scoped_by_version() -> None:
    flawed = merged(BASE, vllm(**decode(expert=1)))
    assert "megamoe-expert-parallel" in ids(found(flawed, "vllm", "0.33.0"))
    assert found(flawed, "vllm", "0.40.0") == []
    assert found(merged(BASE, sglang({"page-size": 64})), "sglang", "0.6.0") == []


def test_a_finding_points_at_what_set_the_value() -> None:
    lines = found(
        merged(BASE, vllm({"moe-backend": "auto"}, None, **decode({"moe-backend": "deep_gemm_mega_moe"}, expert=1))),
        "vllm",
    )
    assert [line.where for line in lines] == ["engines.vllm.roles.decode.args.moe-backend"]
    lines = found(merged(BASE, vllm({"kv-cache-dtype": "fp8", "max-model-len": 2097152})), "vllm")
    assert [line.where for line in lines] == ["engines.vllm.args.max-model-len"]


def test_extra_rules_stay_silent_without_facts() -> None:
    """A card that nothing is known of trips no rule that needs the model's configuration."""
    recipe = parse(Recipe, BASE, "test")
    card = CATALOGUE.model("deepseek-v4-pro").model_copy(update={"id": "new", "formats": {}, "published_bytes": None})
    assert findings(recipe, "vllm", "0.32.0", card, CATALOGUE.hardware("gb300-nvl72"), {}) == []

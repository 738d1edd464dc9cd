"""What a rehearsal changes of a recipe: tables of options and variables, by engine, and the recipe's own on top.

An option that no table names is given to the engine as it is; where the engine refuses it on a processor, the recipe's
``rehearsal.substitutions`` says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fourfold.common.recipe.schema import EngineRecipe, Recipe, Role

# Options that ask for a GPU's kernels, memory or links, or for the model's own tokenizer; they are left out.
LEFT_OUT: dict[str, frozenset[str]] = {
    "vllm": frozenset(
        "kv-transfer-config kv-cache-dtype moe-backend all2all-backend attention-config attention-backend "
        "linear-backend served-model-name "
        "compilation-config max-cudagraph-capture-size cudagraph-capture-sizes gpu-memory-utilization numa-bind "
        "enable-sleep-mode enable-cumem-allocator block-size tokenizer-mode load-format safetensors-load-strategy "
        "enable-eplb eplb-config enable-ep-weight-filter data-parallel-hybrid-lb enable-flashinfer-autotune "
        "disable-custom-all-reduce disable-hybrid-kv-cache-manager mamba-ssm-cache-dtype mamba-cache-dtype "
        "prefix-cache-retention-interval language-model-only mm-encoder-tp-mode tool-call-parser reasoning-parser "
        "enable-auto-tool-choice long-prefill-token-threshold enable-dbo kv-cache-memory-bytes trust-remote-code "
        "distributed-executor-backend offload-group-size offload-num-in-group offload-prefetch-step "
        "default-chat-template-kwargs chat-template limit-mm-per-prompt swap-space cpu-offload-gb".split()
    ),
    "sglang": frozenset(
        "moe-a2a-backend moe-runner-backend moe-dense-tp-size enable-dp-lm-head enable-w4a4-mxfp4-megamoe "
        "deepep-mode deepep-config ep-num-redundant-experts enable-eplb disaggregation-transfer-backend "
        "disaggregation-decode-polling-interval disaggregation-bootstrap-port disaggregation-ib-device "
        "mem-fraction-static cuda-graph-max-bs-decode cuda-graph-max-bs-prefill cuda-graph-bs-decode "
        "cuda-graph-backend-decode cuda-graph-backend-prefill swa-full-tokens-ratio kv-cache-dtype dsa-prefill-backend "
        "dsa-decode-backend fp4-gemm-backend fp8-gemm-backend attention-backend prefill-attention-backend "
        "decode-attention-backend speculative-draft-attention-backend speculative-attention-mode page-size "
        "enable-hierarchical-cache hicache-write-policy hicache-ratio hicache-io-backend hicache-mem-layout "
        "mamba-ssm-dtype mamba-radix-cache-strategy max-mamba-cache-size enable-deepseek-v4-fp4-indexer "
        "disable-flashinfer-autotune enable-flashinfer-allreduce-fusion trust-remote-code load-balance-method "
        "tool-call-parser reasoning-parser served-model-name watchdog-timeout numa-node enable-symm-mem "
        "enable-nccl-nvls model-loader-extra-config chat-template max-prefill-tokens tokenizer-worker-num".split()
    ),
}
SMALL: dict[str, dict[str, int]] = {  # the most that a rehearsal gives
    "vllm": {"max-model-len": 512, "max-num-seqs": 8, "max-num-batched-tokens": 2048},
    "sglang": {"context-length": 512, "max-running-requests": 8, "chunked-prefill-size": 2048},
}
ALWAYS: dict[str, dict[str, Any]] = {
    # In float32, in which an engine's probabilities tell right from nearly right. vLLM 0.32's attention in BF16 takes
    # AMX instructions where the processor names them, and ended with an illegal instruction on such a machine.
    "vllm": {"dtype": "float32", "enforce-eager": True, "max-model-len": 512, "max-num-seqs": 8},
    "sglang": {
        "dtype": "float32",
        "device": "cpu",
        "disable-overlap-schedule": True,
        "attention-backend": "torch_native",
        "context-length": 512,
        "max-running-requests": 8,
        "max-total-tokens": 4096,
        "enable-metrics": True,
    },
}
# --enforce-eager leaves vLLM's log-probabilities to torch.compile, which asks a compiler what the processor has: on a
# core that a server shares with its own waiting threads, that took minutes.
ENV: dict[str, dict[str, str]] = {"vllm": {"TORCHDYNAMO_DISABLE": "1"}, "sglang": {}}
# MLA that takes float32: where the processor has AMX, vLLM takes one for BF16 unless asked.
OF_FAMILY: dict[tuple[str, str], dict[str, Any]] = {("vllm", "deepseek_v3"): {"attention-backend": "CPU_MLA"}}
ENV_LEFT_OUT = (
    *("NCCL_", "UCX_", "MC_", "NVSHMEM_", "CUDA", "TORCH_SYMMMEM", "TILELANG_", "GLOO_", "MOONCAKE_", "HF_"),
    *("VLLM_USE_", "VLLM_SPARSE_", "VLLM_MAX_TOKENS_", "VLLM_NIXL_", "VLLM_DEEP", "VLLM_FLASHINFER", "VLLM_DSV4"),
    *("SGLANG_OPT_", "SGLANG_MOONCAKE_", "SGLANG_DISAGGREGATION_", "SGLANG_JIT_", "SGLANG_DSV4", "SGLANG_SIMULATE_"),
    *("SGLANG_DEEPEP_", "SGLANG_ENABLE_", "FLASHINFER_", "TRTLLM_", "SGLANG_DEFAULT_"),
)


@dataclass(frozen=True)
class Substitution:
    """One change.

    Attributes:
        what: option, variable or part of the recipe.
        requested: what the recipe says; ``used``: what the rehearsal ran with, None: nothing.
        why: one clause.
    """

    what: str
    requested: Any
    used: Any
    why: str


def substituted(
    recipe: Recipe, engine: str, plan: EngineRecipe, role: str, family: str
) -> tuple[dict[str, Any], dict[str, str], list[Substitution]]:
    """Options and variables of one role on a processor, in one rank, and what was changed for it.

    Args:
        family: of the replica.

    Speculation is left to the caller: it needs the replica's head.
    """
    given: Role = next(found for name, found in plan.roles.items() if name == role)
    own = recipe.rehearsal.substitutions if recipe.rehearsal else {}
    changes: list[Substitution] = []
    if given.parallel.world > 1 or given.replicas > 1:
        ranks = f"{given.replicas} x {given.parallel.world}"
        changes.append(Substitution("parallel", ranks, "1 x 1", "one rank of one server"))
    options: dict[str, Any] = {}
    for name, value in {**plan.args, **given.args}.items():
        used, why = _option(engine, name, value, own)
        if why:
            changes.append(Substitution(name, value, used, why))
        if used is not None:
            options[name] = used
    for name, value in {**ALWAYS[engine], **{name: value for name, value in own.items() if value is not None}}.items():
        if options.setdefault(name, value) != value and name not in SMALL[engine] and name not in own:
            changes.append(Substitution(name, options[name], value, "runs on a processor"))
            options[name] = value
    for name, value in OF_FAMILY.get((engine, family), {}).items():
        if name not in options:
            options[name] = value
            changes.append(Substitution(name, None, value, "attention of the replica in float32"))
    env = dict(ENV[engine])
    for name, value in {**plan.env, **given.env}.items():
        if name.startswith(ENV_LEFT_OUT):
            changes.append(Substitution(name, value, None, "of GPUs, their kernels or links"))
        else:
            env[name] = str(value)
    return options, env, changes


def _option(engine: str, name: str, value: Any, own: Mapping[str, Any]) -> tuple[Any, str]:
    """What to use, and why it is another value."""
    if name in own:
        return own[name], "" if own[name] == value else "the recipe's own substitution"
    if name in ALWAYS[engine] and name not in SMALL[engine]:
        return value, ""  # compared later
    if name in LEFT_OUT[engine]:
        return None, "of GPUs, their kernels or links, or of the model's own tokenizer"
    if name == "quantization" and "fourfold" not in str(value):
        return None, "the replica is not quantised: no kernel of it runs on a processor"
    if name in SMALL[engine] and isinstance(value, int) and value > SMALL[engine][name]:
        return SMALL[engine][name], "the replica is small"
    return value, ""

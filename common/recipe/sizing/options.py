"""What a role's arguments say about memory, for both engines, with the engines' defaults where they say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.schema import EngineRecipe, HardwareSheet, Role
from fourfold.common.recipe.sizing.cache import CacheFormat
from fourfold.common.recipe.sizing.traits import Traits

LARGE = 70 << 30  # vLLM's limit between small and large GPUs (engine/arg_utils.py)
MEGA_MOE_TOKENS = "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"


@dataclass(frozen=True)
class Options:
    """Attributes:
    utilisation: share of a GPU's memory for the engine (vLLM), for weights and cache (SGLang).
    batched: tokens of a step on one data-parallel rank.
    sequences: sequences that run at once on one data-parallel rank.
    max_length: tokens of the longest sequence.
    concurrent_batches: batches that vLLM schedules before the first is settled.
    captured: largest batch with a CUDA graph; 0: no graphs.
    mega_tokens: tokens a rank of the mega-MoE buffer; 0: no such buffer.
    draft: whether the checkpoint's draft layers are loaded.
    draft_tokens: drafted tokens of a step.
    window_ratio: SGLang's tokens of the window pool for each token of the full pool.
    engram_offloaded: Engram tables are in the host's memory.
    tables_over_data: data-parallel ranks share one copy of them.
    cache_bytes: a size that the recipe fixes itself; None: what is left.
    cache_tokens: the same in tokens (SGLang's ``max-total-tokens``).
    draft_model: a draft model of its own.
    """

    engine: str
    utilisation: float
    batched: int
    sequences: int
    max_length: int
    cache: CacheFormat
    block: int = 256
    concurrent_batches: int = 1
    captured: int = 0
    graph_modes: int = 1
    mega_tokens: int = 0
    draft: bool = False
    draft_tokens: int = 0
    redundant_experts: int = 0
    window_ratio: float = 0.1
    vision: bool = True
    engram_offloaded: bool = False
    tables_over_data: bool = True
    load_format: str | None = None
    cache_bytes: int | None = None
    cache_tokens: int | None = None
    draft_model: str | None = None

    @property
    def in_flight(self) -> int:
        """Tokens that are scheduled and not settled."""
        return self.batched * self.concurrent_batches

    def with_(self, **changes: Any) -> Options:
        return replace(self, **changes)


def options_of(plan: EngineRecipe, name: str, engine: str, sheet: HardwareSheet, traits: Traits) -> Options:
    """The options of the role ``name``.

    Raises:
        FourfoldError: a value has the wrong type.
    """
    role = next(role for key, role in plan.roles.items() if key == name)
    args = {key.replace("_", "-"): value for key, value in {**plan.args, **role.args}.items()}
    env = {**plan.env, **role.env}
    read = _Args(args)
    if engine == "vllm":
        return _vllm(read, env, role, sheet, traits)
    return _sglang(read, env, role, sheet, traits, name == "decode")


class _Args:
    def __init__(self, args: Mapping[str, Any]) -> None:
        self.args = args

    def number(self, name: str, default: float) -> float:
        value = self.args.get(name)
        if value is None or value == "auto":
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FourfoldError(f"args.{name}: {value!r}; expected a number")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.args.get(name)
        return {str(k).replace("-", "_"): v for k, v in value.items()} if isinstance(value, dict) else {}

    def text(self, name: str, default: str = "") -> str:
        return str(self.args.get(name, default))

    def true(self, name: str) -> bool:
        return self.args.get(name) is True


def _cache_dtype(text: str) -> str:
    if text.startswith("fp8"):
        return "fp8"
    if text.startswith(("nvfp4", "fp4")):
        return "nvfp4"
    return {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "float32": "fp32"}.get(text, "auto")


def _state_dtype(text: str, traits: Traits) -> str:
    if text in ("", "auto"):
        text = str(traits.get("mamba_ssm_cache_dtype", traits.get("mamba_ssm_dtype", "float32")))
    return "bf16" if text in ("bfloat16", "float16", "bf16", "fp16") else "fp32"


def _checkpoint_cache(traits: Traits, chosen: str) -> str:
    """The cache's dtype where the recipe leaves it to the checkpoint; V4 caches FP8 only."""
    if chosen != "auto":
        return chosen
    if traits.count("v4"):
        return "fp8"
    quant = traits.get("quantization_config", {})
    scheme = quant.get("kv_cache_scheme") or quant.get("kv_cache_quant_algo")
    return "fp8" if scheme == "FP8" or isinstance(scheme, dict) and scheme.get("num_bits") == 8 else "auto"


def _vllm(read: _Args, env: Mapping[str, Any], role: Role, sheet: HardwareSheet, traits: Traits) -> Options:
    cpu = sheet.compute_capability is None
    large = sheet.memory_bytes >= LARGE
    given = read.mapping("speculative-config")
    drafted = int(given.get("num_speculative_tokens") or 0)
    method = str(given.get("method") or "")
    eager = read.true("enforce-eager") or cpu
    compilation = read.mapping("compilation-config")
    if compilation.get("cudagraph_mode") == "NONE":
        eager = True
    asynchronous = read.args.get("async-scheduling", True) is not False and not cpu
    engram = read.mapping("engram-config")
    space = env.get("VLLM_CPU_KVCACHE_SPACE")
    fixed = read.number("kv-cache-memory-bytes", 0) or (float(space) * 2**30 if cpu and space is not None else 0)
    batched = int(read.number("max-num-batched-tokens", (8192 if large else 2048) if not cpu else 4096))
    sequences = int(read.number("max-num-seqs", 1024 if large else 256))
    # vLLM captures at most twice the sequences, and 512 where it is not told.
    captured = int(read.number("max-cudagraph-capture-size", min(512, 2 * sequences * (1 + drafted))))
    return Options(
        engine="vllm",
        utilisation=read.number("gpu-memory-utilization", 0.92),
        batched=batched,
        sequences=sequences,
        max_length=int(read.number("max-model-len", traits.max_length or 32768)),
        cache=CacheFormat(
            _checkpoint_cache(traits, _cache_dtype(read.text("kv-cache-dtype", "auto"))),
            "mxfp4" if read.mapping("attention-config").get("indexer_kv_dtype") == "mxfp4" else "fp8",
            _state_dtype(read.text("mamba-ssm-cache-dtype"), traits),
        ),
        block=int(read.number("block-size", 256)),
        concurrent_batches=role.parallel.pipeline + 1 if asynchronous else role.parallel.pipeline,
        captured=0 if eager else captured,
        graph_modes=1 if compilation.get("cudagraph_mode") == "FULL_DECODE_ONLY" else 2,
        mega_tokens=batched if "mega_moe" in read.text("moe-backend") else 0,
        draft=bool(drafted) and method in ("mtp", "dspark") and not given.get("model"),
        draft_tokens=drafted,
        redundant_experts=int(read.mapping("eplb-config").get("num_redundant_experts") or 0),
        vision=not read.true("language-model-only"),
        engram_offloaded=engram.get("cpu_offload", True) is not False,  # EngramConfig's default
        tables_over_data=engram.get("embedding_across_dp") is True,
        load_format="nvfp4" if read.text("quantization") == "fourfold_nvfp4" else None,
        cache_bytes=int(fixed) or None,
        draft_model=str(given["model"]) if given.get("model") else None,
    )


def _sglang(
    read: _Args, env: Mapping[str, Any], role: Role, sheet: HardwareSheet, traits: Traits, decodes: bool
) -> Options:
    cpu = sheet.compute_capability is None
    data = role.parallel.data
    algorithm = read.text("speculative-algorithm").upper()
    default_drafts = read.number("speculative-dspark-block-size", read.number("speculative-num-steps", 3))
    drafted = int(read.number("speculative-num-draft-tokens", default_drafts + 1)) - 1 if algorithm else 0
    # Left to itself with speculation, 0.5.23 runs 48 requests.
    running = int(read.number("max-running-requests", 48 if algorithm else 2048))
    prefill = int(read.number("chunked-prefill-size", 16384 if sheet.memory_bytes > 160 << 30 else 8192))
    batched = max(1, prefill // data)
    graphs = read.text("cuda-graph-backend-decode") != "disabled" and not read.true("disable-cuda-graph") and not cpu
    captured = int(read.number("cuda-graph-max-bs-decode", 512))
    mega = read.text("moe-a2a-backend") == "megamoe"
    tokens = env.get(MEGA_MOE_TOKENS, batched)
    if isinstance(tokens, str) and not tokens.isdigit():
        raise FourfoldError(f"env.{MEGA_MOE_TOKENS}: {tokens!r}; expected a whole number")
    reserve = prefill * 1.5 * 2**20 + captured * 2 * 2**20  # memory_hook.py: what it leaves where it is not told
    fraction = 1 - reserve / sheet.memory_bytes if not cpu else 0.9
    total = int(read.number("max-total-tokens", 0))
    return Options(
        engine="sglang",
        utilisation=read.number("mem-fraction-static", round(max(0.5, fraction), 3)),
        batched=max(1, running // data) * (1 + drafted) if decodes else batched,
        sequences=max(1, running // data),
        max_length=int(read.number("context-length", traits.max_length or 32768)),
        cache=CacheFormat(
            _checkpoint_cache(traits, _cache_dtype(read.text("kv-cache-dtype", "auto"))),
            "mxfp4" if read.true("enable-deepseek-v4-fp4-indexer") else "fp8",
            _state_dtype(read.text("mamba-ssm-dtype"), traits),
        ),
        block=int(read.number("page-size", 256)),
        captured=captured if graphs else 0,
        mega_tokens=int(tokens) if mega else 0,
        draft=algorithm in ("EAGLE", "NEXTN", "DSPARK", "FOURFOLD_MTP")
        and "speculative-draft-model-path" not in read.args,
        draft_tokens=drafted,
        redundant_experts=int(read.number("ep-num-redundant-experts", 0)),
        window_ratio=read.number("swa-full-tokens-ratio", 0.1),
        engram_offloaded=str(env.get("SGLANG_ENABLE_DSV41_ENGRAM_HOST_TABLE", "")).lower() in ("1", "true", "yes"),
        load_format="nvfp4" if read.text("quantization") == "fourfold_nvfp4" else None,
        cache_tokens=total or None,
        draft_model=read.text("speculative-draft-model-path") or None,
    )

"""Memory of the KV cache and of recurrent state: per token, per sequence, and what engines reserve per batched token.

Content is what a token leaves behind. Engines allocate more: vLLM packs all layers of a kind into blocks of one size
(`Blocks`, here for V4 alone; what other hybrids lose to padding is not counted), SGLang sizes pools by ratios. Byte
layouts are those of vLLM 0.32 (``models/deepseek_v4/compressor.py``, ``v1/kv_cache_interface.py``) and SGLang 0.5.23
(``model_executor/pool_configurator.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fourfold.common.recipe.schema import Parallel
from fourfold.common.recipe.sizing.traits import Layer, Traits

V4_ENTRY = 584  # 448 bytes of FP8, 64 rotated BF16 values, 8 scales
V4_ALIGNMENT = 576
V4_WINDOW_BLOCK = 64  # tokens
V4_STATE_BLOCK = {4: 4, 128: 8}  # tokens of compressor state in a block
DSA_ENTRY = 656  # fp8_ds_mla of V3.2: 512 FP8 values, 4 float32 scales, 64 rotated BF16 values
ELEMENT = {"auto": 2.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "nvfp4": 0.5625, "fp32": 4.0}


@dataclass(frozen=True)
class CacheFormat:
    """Formats of what is cached: ``kv`` and ``indexer`` are names of `ELEMENT` or ``mxfp4``; ``state`` of SSM state."""

    kv: str = "auto"
    indexer: str = "fp8"
    state: str = "fp32"


@dataclass(frozen=True)
class Group:
    """Layers of one kind in vLLM's pool: a block of it holds ``tokens`` tokens; it keeps ``window``, 0: all."""

    what: str
    page: int
    tokens: int
    window: int = 0

    def blocks(self, length: int, in_flight: int) -> int:
        """Blocks that a sequence of ``length`` tokens may claim while ``in_flight`` tokens are not settled.

        vLLM's ``SlidingWindowSpec.max_admission_blocks_per_request``.
        """
        if not self.window:
            return -(-length // self.tokens)
        return -(-min(self.window - 1 + in_flight, length) // self.tokens) + 1


@dataclass(frozen=True)
class Blocks:
    """vLLM's packed pool: every block has the bytes of the widest group."""

    groups: tuple[Group, ...]

    @property
    def block_bytes(self) -> int:
        return max(group.page for group in self.groups)

    def demand(self, length: int, in_flight: int) -> int:
        """Bytes that vLLM counts for one sequence: it refuses to start where ``max-model-len`` does not fit."""
        return self.block_bytes * sum(group.blocks(length, in_flight) for group in self.groups)


@dataclass(frozen=True)
class Cache:
    """On one rank, in bytes.

    Attributes:
        per_token: by part; grows with a sequence.
        per_sequence: by part; windows and recurrent state of one sequence.
        per_batched_token: state that a token holds while its batch is not settled.
        blocks: vLLM's packed layout; None: content fills it.
    """

    per_token: dict[str, float]
    per_sequence: dict[str, float]
    per_batched_token: float = 0.0
    blocks: Blocks | None = None
    compressed_state: float = 0.0  # SGLang: compressor state of ratio 128, for each running request
    window_token: float = 0.0  # SGLang: bytes of one token of the window pool
    notes: tuple[str, ...] = field(default=())

    @property
    def token_bytes(self) -> float:
        return sum(self.per_token.values())

    @property
    def sequence_bytes(self) -> float:
        return sum(self.per_sequence.values())

    def content(self, length: int) -> float:
        """Bytes that a sequence of ``length`` tokens leaves behind."""
        return self.token_bytes * length + self.sequence_bytes

    def sequence(self, length: int, step: int = 1) -> float:
        """Bytes that it takes up in vLLM, ``step`` tokens being written."""
        if self.blocks is None:
            return self.content(length)
        return float(self.blocks.demand(length, step))

    def in_flight(self, tokens: int, length: int) -> float:
        """Bytes of state of ``tokens`` batched tokens of sequences of ``length``; all sequences share it."""
        if self.blocks is None:
            return self.per_batched_token * tokens
        whole, rest = divmod(tokens, max(1, length))
        least = self.blocks.demand(length, 1)
        size = whole * (self.blocks.demand(length, length) - least)
        return float(size + (self.blocks.demand(length, rest) - least if rest else 0))


def cache_of(
    traits: Traits,
    parallel: Parallel,
    formats: CacheFormat | None = None,
    engine: str = "vllm",
    block: int = 256,
    speculative: int = 0,
) -> Cache:
    """The cache of one rank of a replica.

    Args:
        block: tokens of a block of full attention.
        speculative: draft tokens of a step; recurrent state is kept for each.
    """
    formats = formats or CacheFormat()
    layers = traits.layers[: -(-len(traits.layers) // parallel.pipeline)] if parallel.pipeline > 1 else traits.layers
    if any(layer.mixer == "v4" for layer in layers):
        return _v4(traits, layers, formats, engine, block, speculative)
    return _plain(traits, layers, parallel, formats, speculative)


def _plain(
    traits: Traits, layers: Sequence[Layer], parallel: Parallel, formats: CacheFormat, speculative: int
) -> Cache:
    token: dict[str, float] = {}
    sequence: dict[str, float] = {}
    batched = 0.0
    size = ELEMENT[formats.kv]
    for layer in layers:
        if layer.mixer == "mla":
            latent, rope = traits.number("kv_lora_rank"), traits.number("qk_rope_head_dim")
            sparse = bool(traits.get("index_topk"))
            entry = DSA_ENTRY if sparse and formats.kv == "fp8" and latent == 512 else (latent + rope) * size
            _add(token, "MLA latents", entry / parallel.context)
            if layer.indexer:
                dim = traits.number("index_head_dim")
                key = dim / 2 + dim / 32 if formats.indexer == "mxfp4" else dim + 4 * math.ceil(dim / 128)
                _add(token, "indexer keys", key / parallel.context)
        elif layer.mixer == "gqa":
            heads = max(1, traits.kv_heads // parallel.tensor)
            entry = 2 * heads * traits.head_dim * size
            if layer.window:
                _add(sequence, "sliding windows", entry * layer.window)
                batched += entry
            else:
                _add(token, "keys and values", entry / parallel.context)
            if layer.indexer:
                _add(token, "indexer keys", int(traits.mapping("sparse_attention_config")["sparse_index_dim"]) * 2.0)
        elif layer.mixer in ("gdn", "kda", "mamba2"):
            _add(sequence, "recurrent state", _state(traits, layer.mixer, formats) / parallel.tensor)
    if "recurrent state" in sequence:  # vLLM's MambaSpec keeps one state for each draft token
        sequence["recurrent state"] *= 1 + speculative
    return Cache(token, sequence, batched)


def _state(traits: Traits, mixer: str, formats: CacheFormat) -> float:
    """Bytes of the state of one sequence and layer: the recurrent matrix and the tail of the convolution."""
    number, size = traits.number, ELEMENT[formats.state]
    if mixer == "gdn":
        keys, dim = number("linear_num_key_heads"), number("linear_key_head_dim")
        values, width = number("linear_num_value_heads"), number("linear_value_head_dim")
        tail = (number("linear_conv_kernel_dim", 4) - 1) * (2 * keys * dim + values * width)
        return values * width * dim * size + tail * 2
    if mixer == "kda":
        linear = traits.mapping("linear_attn_config")
        heads, dim = int(linear.get("num_heads") or traits.heads), int(linear.get("head_dim") or 128)
        return heads * dim * dim * size + 3 * 3 * heads * dim * 2
    heads, dim, state = number("mamba_num_heads"), number("mamba_head_dim"), number("ssm_state_size")
    tail = (number("conv_kernel", 4) - 1) * (heads * dim + 2 * number("n_groups", 1) * state)
    return heads * dim * state * size + tail * 2


def _v4(
    traits: Traits, layers: Sequence[Layer], formats: CacheFormat, engine: str, block: int, speculative: int
) -> Cache:
    """DeepSeek V4: compressed entries, indexer keys, windows, and float32 compressor state of tokens not settled."""
    dim, small, window = traits.head_dim, traits.number("index_head_dim", 128), traits.number("sliding_window")
    key = small // 2 + small // 32 if formats.indexer == "mxfp4" else small + 4
    token: dict[str, float] = {}
    counts: dict[int, int] = {}
    indexers = 0
    for layer in layers:
        if layer.ratio and layer.caches:
            counts[layer.ratio] = counts.get(layer.ratio, 0) + 1
            _add(token, f"entries compressed by {layer.ratio}", V4_ENTRY / layer.ratio)
            if layer.indexer:
                indexers += 1
                _add(token, "indexer keys", key / layer.ratio)
    sequence = {"sliding windows": float(len(layers) * window * V4_ENTRY)}
    state = {ratio: 2 * (2 if ratio == 4 else 1) * dim * 4 for ratio in counts if ratio in V4_STATE_BLOCK}
    small_state = 4 * small * 4
    batched = sum(counts[r] * state[r] for r in state) + indexers * small_state + len(layers) * V4_ENTRY
    rings = (16, 256) if speculative else (8, 128)  # SGLang's rows of compressor state for ratios 4 and 128
    in_window = len(layers) * V4_ENTRY + counts.get(4, 0) * rings[0] / 256 * (state.get(4, 0) + small_state)
    requests = counts.get(128, 0) * rings[1] * state.get(128, 0)
    blocks = None
    if engine == "vllm" and state:
        blocks = _v4_blocks(counts, len(layers), state, small_state, key, window, block)
    return Cache(token, sequence, batched, blocks, requests, in_window)


def _v4_blocks(
    counts: dict[int, int],
    layers: int,
    state: dict[int, int],
    small_state: int,
    key: int,
    window: int,
    block: int,
) -> Blocks:
    """The groups that ``_get_packed_kv_cache_groups`` makes; their pages are those that vllm#54703 reports."""
    pages = {ratio: _aligned(max(1, block // ratio) * V4_ENTRY) for ratio in counts}
    keys = _aligned(block // 4 * key)
    full = sum(counts[r] * pages[r] for r in counts) + counts.get(4, 0) * keys
    groups = [Group("compressed entries and indexer keys", full, block)]
    page = _aligned(V4_WINDOW_BLOCK * V4_ENTRY)
    split = -(-layers // _repeats([layers, *(counts[r] for r in state)], counts.get(4, 1)))
    for i in range(split):
        number = layers // split + (i < layers % split)
        groups.append(Group("sliding windows", number * page, V4_WINDOW_BLOCK, window))
    for ratio, bytes_ in state.items():
        tokens = V4_STATE_BLOCK[ratio]
        page = _aligned(tokens * bytes_) + (_aligned(tokens * small_state) if ratio == 4 else 0)
        kept = ratio * (2 if ratio == 4 else 1)
        groups.append(Group(f"compressor state by {ratio}", counts[ratio] * page, tokens, kept))
    return Blocks(tuple(groups))


def _repeats(counts: list[int], least: int) -> int:
    """Layers of a group: the number that wastes least when all counts are rounded up to it; the larger of equals."""
    return min(range(least, max(counts) + 1), key=lambda n: (sum(-c % n for c in counts), -n), default=least)


def _aligned(size: int) -> int:
    return -(-size // V4_ALIGNMENT) * V4_ALIGNMENT


def _add(into: dict[str, float], name: str, value: float) -> None:
    into[name] = into.get(name, 0.0) + value

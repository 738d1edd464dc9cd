"""Memory beside weights and cache: mega-MoE buffers, activations, CUDA graphs, the CUDA context.

The buffers follow DeepGEMM's layout (``include/deep_gemm/layout/mega_moe.cuh``). Activations, graphs and context are
allowances: engines measure them at start, and no published figure separates them.
"""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.common.recipe.schema import HardwareSheet, Parallel
from fourfold.common.recipe.sizing.options import Options
from fourfold.common.recipe.sizing.traits import Traits

LARGEST_BLOCK, BLOCK_MULTIPLE = 240, 1920  # kMaxCandidateBlockM, kLCMCandidateBlockM
SIGNALS = 21 << 20  # MegaMoESignals: four arrays over 2^20 ring blocks
SOURCE = 12  # TokenSrcMetadata
CONTEXT = 1.5e9  # CUDA context and communicators
GRAPH, GRAPH_BASE = 12e6, 0.4e9  # a captured batch size; the pool that they share
WIDTHS = 6  # live hidden-sized BF16 tensors of a token in a layer


@dataclass(frozen=True)
class Reserve:
    """Bytes beside weights and cache. ``least`` is the smallest that the sources allow."""

    what: str
    bytes: float
    least: float
    allowance: bool


def reserves(traits: Traits, parallel: Parallel, options: Options, sheet: HardwareSheet) -> list[Reserve]:
    """All of one rank."""
    out = []
    if options.mega_tokens and traits.experts:
        most, least = mega_moe_bytes(traits, parallel, options.mega_tokens)
        out.append(Reserve(f"mega-MoE buffers, {options.mega_tokens} tokens a rank", most, least, False))
    active = _activations(traits, parallel, options)
    out.append(Reserve(f"activations of {options.batched} tokens", active, active / 2, True))
    if sheet.compute_capability is None:
        return out
    if options.captured:
        sizes = graph_sizes(options.captured)
        size = (GRAPH_BASE + GRAPH * sizes * len(traits.layers) / 60) * options.graph_modes
        out.append(Reserve(f"CUDA graphs of {sizes} batch sizes", size, size / 2, True))
    out.append(Reserve("CUDA context, communicators", CONTEXT, CONTEXT / 2, True))
    return out


def graph_sizes(largest: int) -> int:
    """Batch sizes that vLLM captures up to ``largest``: 1, 2, 4, every 8 to 256, every 16 above."""
    return sum(n <= largest for n in (1, 2, 4)) + min(largest, 256) // 8 + max(0, largest - 256) // 16


def mega_moe_bytes(traits: Traits, parallel: Parallel, tokens: int) -> tuple[float, float]:
    """Symmetric buffers of one rank for ``tokens`` tokens a rank, at most and at least.

    The activations of routed tokens go through a ring: at most all that may arrive, at least one expert's wave.
    """
    ranks = parallel.expert if parallel.expert > 1 else parallel.tensor * parallel.data
    local = max(1, traits.experts // ranks)
    tokens = -(-tokens // BLOCK_MULTIPLE) * BLOCK_MULTIPLE  # get_token_alignment_for_mega_moe
    pool = ranks * tokens * min(traits.top_k, local) + local * (LARGEST_BLOCK - 1)
    wave = ranks * tokens + LARGEST_BLOCK - 1
    hidden, inter = traits.expert_hidden, traits.expert_inter
    routed = hidden + inter + (hidden + inter) / 32  # FP8 values and their scales
    fixed = SIGNALS + 4 * traits.experts * tokens + SOURCE * pool
    fixed += tokens * (hidden * (1 + 1 / 32) + traits.top_k * 12)  # inputs: values, expert numbers and weights
    fixed += tokens * traits.top_k * hidden * 2  # combine: one BF16 row for each expert of a token
    return fixed + pool * routed, fixed + wave * routed


def _activations(traits: Traits, parallel: Parallel, options: Options) -> float:
    tokens = options.batched
    wide = tokens * traits.hidden * 2 * (WIDTHS + 2 * traits.streams)
    heads = tokens * traits.heads / parallel.tensor * traits.head_dim * 2 * 2
    routed = 0.0
    if traits.experts and not options.mega_tokens:
        routed = tokens * traits.top_k * (traits.expert_hidden + 2 * traits.expert_inter) * 2
    rows = min(options.sequences, tokens) * (1 + options.draft_tokens)
    logits = min(rows, tokens) * traits.vocab / parallel.tensor * 4 * 2
    scores = 512 * 2**20 if traits.get("index_topk") else 0  # VLLM_SPARSE_INDEXER_MAX_LOGITS_MB
    return wide + heads + routed + logits + scores

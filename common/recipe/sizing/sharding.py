"""Bytes of weights on one rank.

Tensor ranks split heads and widths, data ranks hold copies, expert ranks whole experts; without expert parallelism all
ranks of a replica split each expert. What kernels add to that (padded and repeated layouts) is one factor, calibrated
on memory that was observed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from fourfold.common.recipe.schema import Parallel
from fourfold.common.recipe.sizing.traits import Traits
from fourfold.common.recipe.sizing.weights import Weight

DRAFTS = ("MTP", "DSpark draft")


@dataclass(frozen=True)
class Observed:
    """Weights of one rank as an engine reported them.

    Attributes:
        low, high: bytes; they differ where the report does not say whether its GB are 10^9 or 2^30 bytes.
        placed: bytes by `per_rank` for the same checkpoint and layout, without a factor.
    """

    what: str
    low: float
    high: float
    placed: float
    source: str


# DeepSeek-V4-Pro (MXFP4 experts). `placed` is checked against `per_rank` by tests/recipes/test_recipe_fit.py.
OBSERVED = (
    Observed(
        "TP8, decode",
        107.98 * 2**30,
        107.98 * 2**30,
        111.3e9,
        "decode log of vLLM on GB200, 107.98 GiB; recipes.md 1.2",
    ),
    Observed(
        "DEP4", 233e9, 233 * 2**30, 238.0e9, "github.com/SemiAnalysisAI/InferenceX pull 2226: '233 GB', unit not said"
    ),
)


@cache
def layout_factor(observed: Sequence[Observed] = OBSERVED) -> float:
    """Bytes on a rank for each byte placed there: the factor with the smallest largest error on what was observed.

    A report in an unclear unit counts with the end of its range that is nearer. Never below 1.
    """
    ratios = [(o.low / o.placed, o.high / o.placed) for o in observed]

    def worst(factor: float) -> float:
        return max(min(abs(factor / low - 1), abs(factor / high - 1)) for low, high in ratios)

    candidates = [1 + step / 1000 for step in range(0, 151)]
    return min(candidates, key=worst)


def share(
    weight: Weight, parallel: Parallel, traits: Traits, redundant: int = 0, tables_over_data: bool = True
) -> float:
    """The part of ``weight`` that the fullest rank of its stage holds."""
    tensor = parallel.tensor
    if weight.shard in ("heads", "width", "vocab"):
        return 1 / tensor
    if weight.shard == "table":
        return 1 / (tensor * (parallel.data if tables_over_data else 1))
    if weight.shard == "kv":
        return 1 / min(tensor, traits.kv_heads)
    if weight.shard == "experts":
        ranks = parallel.tensor * parallel.data
        if parallel.expert == 1:
            return 1 / ranks
        total = (traits.draft_experts if weight.part in DRAFTS else traits.experts) or 1
        return -(-(total + redundant) // parallel.expert) / total
    return 1.0


def per_rank(
    weights: Iterable[Weight],
    parallel: Parallel,
    traits: Traits,
    redundant: int = 0,
    tables_over_data: bool = True,
) -> dict[tuple[str, str, bool], float]:
    """Bytes on the fullest rank by (part, format, whether every rank holds it whole), without a layout factor.

    Pipeline stages share the layers evenly; the last stage, which has the head and the drafts, is counted.
    """
    out: dict[tuple[str, str, bool], float] = defaultdict(float)
    layers = len(traits.layers)
    stage = -(-layers // parallel.pipeline) / layers
    for weight in weights:
        if parallel.pipeline > 1 and weight.part == "embeddings":
            continue
        of_layers = 0 <= weight.layer < layers
        bytes_ = (
            weight.bytes * share(weight, parallel, traits, redundant, tables_over_data) * (stage if of_layers else 1.0)
        )
        out[weight.part, weight.format, weight.shard == "all"] += bytes_
    return dict(out)

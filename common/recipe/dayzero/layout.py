"""The smallest layout of ranks that holds a model with room for requests.

Sizes are those of `sizing`: weights by part and format, the cache of a sequence, the factor that kernels' layouts add.
Attention of latents (MLA) is not split by tensor ranks, which hold copies of its cache; throughput therefore goes to
data ranks with shared experts, few fast streams to tensor ranks (DeepSeek-V3 technical report, section 3.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.schema import HardwareSheet, Parallel
from fourfold.common.recipe.sizing.cache import CacheFormat, cache_of
from fourfold.common.recipe.sizing.sharding import layout_factor, per_rank
from fourfold.common.recipe.sizing.traits import Traits
from fourfold.common.recipe.sizing.weights import Weight

UTILISATION = 0.9  # of a GPU's memory; both engines' recipes for such models have 0.85 to 0.94
RESERVE = 6e9  # bytes of a rank: CUDA graphs, activations, communication buffers
LATENT = ("mla", "v4")
WORLDS = (1, 2, 4, 8, 16, 32, 64)
STAGES = (2, 4)
# Multiples of values that a format's blocks need of a split width.
BLOCK = {"fp8_block128": 128, "fp8_block32": 32, "mxfp8": 32, "mxfp4": 32, "nvfp4": 16, "int4": 128}


@dataclass(frozen=True)
class Demand:
    """What the layout is for.

    Attributes:
        prompt, answer: tokens of a typical request.
        length: longest request that shall be possible.
        least: requests that must fit on a rank at once.
        most: requests of a rank beyond which none are admitted.
        batched: tokens of a step.
        throughput: many slow streams instead of few fast ones.
        concurrency: requests over the whole deployment; None: what fits.
    """

    prompt: int
    answer: int
    length: int
    least: int
    most: int
    batched: int
    throughput: bool
    concurrency: int | None = None

    @property
    def tokens(self) -> int:
        """Of a typical request."""
        return self.prompt + self.answer

    def within(self, longest: int) -> Demand:
        """The same for a model of at most ``longest`` tokens: the prompt is shorter first."""
        answer = min(self.answer, longest // 2)
        return replace(self, prompt=min(self.prompt, longest - answer), answer=answer, length=min(self.length, longest))


@dataclass(frozen=True)
class Layout:
    """A layout that holds the model.

    Attributes:
        weights: bytes on the fullest rank, with the layout factor.
        budget: bytes that the engine may use there.
        sequence: bytes of a typical request's cache.
        sequences: requests of a rank at once.
        length: longest request.
    """

    parallel: Parallel
    weights: float
    budget: float
    sequence: float
    sequences: int
    length: int


def layouts(
    traits: Traits,
    weights: list[Weight],
    sheet: HardwareSheet,
    demand: Demand,
    cache: CacheFormat,
    scale: float,
    drafts: int,
) -> Iterator[Layout]:
    """Layouts that hold the weights and ``demand.least`` requests, the best first.

    Few GPUs are better than many; for throughput, data ranks are better than tensor ranks of more than half as many.

    Args:
        scale: bytes of the checkpoint for each byte that the sizes account for.
        drafts: draft tokens of a step.

    Raises:
        FourfoldError: after the last; names what the last lacked.
    """
    widths = _widths(traits, weights)
    ranked = [(2.0 * p.world if demand.throughput else p.world, p) for p in _candidates(traits, sheet, False, widths)]
    if demand.throughput:
        ranked += [(p.world - 0.5, p) for p in _candidates(traits, sheet, True, widths)]
    lacks = "no number of ranks divides its heads and experts"
    for parallel in dict.fromkeys(parallel for _, parallel in sorted(ranked, key=lambda item: item[0])):
        found = _layout(traits, weights, sheet, demand, cache, scale, drafts, parallel)
        if isinstance(found, Layout):
            yield found
        else:
            lacks = found
    raise FourfoldError(f"hardware {sheet.id}: no layout holds this model; {lacks}")


def _layout(
    traits: Traits,
    weights: list[Weight],
    sheet: HardwareSheet,
    demand: Demand,
    cache: CacheFormat,
    scale: float,
    drafts: int,
    parallel: Parallel,
) -> Layout | str:
    """The layout, or what it lacks."""
    held = sum(per_rank(weights, parallel, traits).values()) * layout_factor() * scale
    budget = sheet.memory_bytes * UTILISATION
    kept = cache_of(traits, parallel, cache, speculative=drafts)
    length = demand.length
    while True:
        room = budget - held - (RESERVE if sheet.compute_capability else 0) - kept.in_flight(demand.batched, length)
        if kept.sequence(length) <= room or length <= 2 * demand.tokens:
            break
        length //= 2  # engines refuse to start where one request of the longest length does not fit
    sequence = kept.sequence(demand.tokens)
    fit = int(room // sequence) if sequence else demand.most
    ranks = parallel.data
    needed = max(demand.least, -(-demand.concurrency // ranks)) if demand.concurrency else demand.least
    if room <= 0 or fit < needed or kept.sequence(length) > room:
        return (
            f"{parallel.world} ranks of {sheet.memory_bytes / 1e9:.0f} GB hold {held / 1e9:.0f} GB of weights each and "
            f"{max(fit, 0)} requests of {demand.tokens} tokens; expected {needed}"
        )
    if demand.concurrency:
        fit = min(fit, -(-demand.concurrency // ranks))
        return Layout(parallel, held, budget, sequence, max(1, fit), length)
    return Layout(parallel, held, budget, sequence, _power(min(fit, demand.most)), length)


def _candidates(
    traits: Traits, sheet: HardwareSheet, throughput: bool, widths: Mapping[int, int]
) -> Iterator[Parallel]:
    joined = max(sheet.nvlink_domain, 1 if sheet.compute_capability is None else sheet.gpus_per_node)
    latent = any(layer.mixer in LATENT for layer in traits.layers)
    for world in WORLDS:
        if world > joined or (world > sheet.gpus_per_node and world % sheet.gpus_per_node):
            continue
        if not traits.experts:
            if splits(traits, world, widths):
                yield Parallel(tensor=world)
            continue
        if traits.experts % world:
            continue
        tensor = 1 if latent and throughput else world
        if not latent:  # key-value heads bound what tensor ranks save
            tensor = min(tensor, max(traits.kv_heads, 1), sheet.gpus_per_node if throughput else world)
        while (  # vLLM keeps a data rank on one node
            world % tensor or not splits(traits, tensor, widths) or sheet.gpus_per_node < tensor < world
        ):
            tensor -= 1
        yield Parallel(tensor=tensor, data=world // tensor, expert=world if world > 1 else 1)
    per_node = sheet.gpus_per_node
    if (
        sheet.compute_capability
        and joined <= per_node
        and splits(traits, per_node, widths)
        and traits.experts % per_node == 0
    ):
        for stages in STAGES:  # between nodes only activations travel
            yield Parallel(tensor=per_node, pipeline=stages, expert=per_node if traits.experts else 1)


def splits(traits: Traits, ranks: int, widths: Mapping[int, int]) -> bool:
    """Whether heads, groups and widths divide over tensor ranks; ``widths``: width to the multiple each part needs."""
    get = traits.get
    linear: Mapping[str, Any] = get("linear_attn_config", {})
    counts = [traits.heads, int(get("o_groups")), int(get("mamba_num_heads")), int(linear.get("num_heads") or 0)]
    counts += [int(get("linear_num_value_heads")), int(get("linear_num_key_heads"))]
    if any(count % ranks for count in counts):
        return False
    if ranks > 1 and any(width % (ranks * block) for width, block in widths.items()):
        return False
    if any(layer.mixer == "gqa" for layer in traits.layers):
        return traits.kv_heads % ranks == 0 or ranks % traits.kv_heads == 0
    return True


def _widths(traits: Traits, weights: list[Weight]) -> dict[int, int]:
    """Widths that tensor ranks split, each with the block of its format."""
    of_part = {"dense": traits.dense_inter, "shared": traits.shared_inter}
    out: dict[int, int] = {}
    for weight in weights:
        width = of_part.get(weight.part, 0)
        if width and weight.shard == "width":
            out[width] = max(out.get(width, 1), BLOCK.get(weight.format, 1))
    return out


def _power(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)

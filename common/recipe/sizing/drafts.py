"""Draft models of their own: their weights as tensor ranks share them, and what their layers cache.

Sizes are those of the draft's config.json. What of ``total_parameters`` its layers, the projection of the target's
hidden states and the Markov head do not explain are embeddings and a head of its own, where it brings them. Shares are
those of vLLM 0.32 (``qwen3_dspark.py``, ``qwen3_dflash.py``, ``llama_eagle3.py``) and SGLang 0.5.23 (``dflash.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.schema import ModelCard, Parallel
from fourfold.common.recipe.sizing.cache import Cache, CacheFormat, cache_of
from fourfold.common.recipe.sizing.formats import format_named
from fourfold.common.recipe.sizing.quantisation import Formats
from fourfold.common.recipe.sizing.traits import Traits, flat, read_traits
from fourfold.common.recipe.sizing.weights import Weight, weights

PART = "draft model"
EAGLE3_SOURCES = 3  # hidden states of the target that EAGLE3 projects, where its config names none
SOURCES = ("target_layer_ids", "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")


def draft_traits(card: ModelCard, config: Mapping[str, Any]) -> Traits | None:
    """The traits of a draft model's layers; None: its config does not say them, or those of a whole target.

    Args:
        config: its config.json; speculators' format has the layers under ``transformer_layer_config``.
    """
    body = config.get("transformer_layer_config")
    try:
        traits = read_traits(flat(body if isinstance(body, Mapping) else config), f"config of {card.id}")
    except FourfoldError:
        return None
    return traits if _in_layers(card, traits) <= card.total_parameters * 1e9 else None


def draft_weights(card: ModelCard, config: Mapping[str, Any], traits: Traits | None) -> list[Weight]:
    """All weights of a draft model; one weight that every rank holds whole where ``traits`` is None."""
    total = round(card.total_parameters * 1e9)
    format = format_named(next(iter(card.formats.values()), "bf16"), f"model card {card.id}")
    whole = Weight(PART, card.repo, total, format, "all")
    if traits is None:
        return [whole]
    layers = _in_layers(card, traits)
    copied = _sources(config) * traits.hidden**2 + 2 * traits.vocab * int(config.get("markov_rank") or 0)
    rest = total - layers - copied
    if rest < 0:
        return [whole]
    sizes = {"heads": layers, "vocab": rest, "all": copied}
    return [replace(whole, parameters=size, shard=shard) for shard, size in sizes.items() if size]


def with_draft(cache: Cache, traits: Traits, parallel: Parallel, formats: CacheFormat) -> Cache:
    """The target's cache and that of a draft model's layers, which context-parallel ranks do not share.

    V4's packed pools are left as they are.
    """
    if cache.blocks is not None:
        return cache
    ranks = Parallel(tensor=parallel.tensor)
    own = cache_of(traits, ranks, formats)
    return replace(
        cache,
        per_token=cache.per_token | {f"{name} of the draft": size for name, size in own.per_token.items()},
        per_sequence=cache.per_sequence | {f"{name} of the draft": size for name, size in own.per_sequence.items()},
        per_batched_token=cache.per_batched_token + own.per_batched_token,
    )


def _in_layers(card: ModelCard, traits: Traits) -> int:
    """Parameters of the draft's layers."""
    return sum(w.parameters for w in weights(traits, Formats({}, card.formats), draft=False) if w.layer >= 0)


def _sources(config: Mapping[str, Any]) -> int:
    """Hidden states of the target that the draft projects into one."""
    for part in (config, config.get("dflash_config"), config.get("eagle_config")):
        for name in SOURCES:
            if isinstance(part, Mapping) and isinstance(part.get(name), list):
                return len(part[name])
    return EAGLE3_SOURCES

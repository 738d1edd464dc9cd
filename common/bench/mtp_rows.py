"""Rows of ``fourfold bench mtp`` and the ratios that follow from them.

Each speed is divided by that of the server without speculation and with the same target, in the same turn; a row has
the median of these ratios. What is derived combines ratios only, so that configurations of different groups compare.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from fourfold.common.bench.flow import Flow

NONE, ADAPTIVE, HYBRID = "none", "adaptive", "hybrid"
ENGINE = "engine-adaptive"  # the engine's own learned length, which SGLang has
STOCK = "stock"  # no speculation and no fourfold
MIXED = "nvfp4+bf16-head"  # quantised target, unquantised head
WEIGHTS = ("bf16", "nvfp4", MIXED)


def fixed(k: int) -> str:
    """The configuration that always drafts ``k`` tokens."""
    return f"k={k}"


def target_of(weights: str) -> str:
    """The weights of the target model."""
    return weights.split("+")[0]


@dataclass(frozen=True)
class Turn:
    """One measurement.

    Attributes:
        turn: number over all groups and rounds; those of one number, batch and kind of prompts compare.
    """

    weights: str
    configuration: str
    prompts: str
    batch: int
    turn: int
    flow: Flow


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        tokens_per_second: median over the turns; low and high are their range.
        ratio: to no speculation with the same target, median over the turns.
        length: mean acceptance length, 1 + accepted tokens / verified drafts; None without drafts.
        acceptance: by position, the share of verified drafts in which it was accepted.
    """

    weights: str
    configuration: str
    prompts: str
    batch: int
    tokens_per_second: float
    low: float
    high: float
    ratio: float
    length: float | None
    acceptance: tuple[float, ...]


def complete(turns: Sequence[Turn]) -> list[Turn]:
    """Those of ``turns`` that have one without speculation to compare with; all, unless the run ended early."""
    base = {(t.turn, t.prompts, t.batch, t.weights) for t in turns if t.configuration == NONE}
    return [t for t in turns if (t.turn, t.prompts, t.batch, target_of(t.weights)) in base]


def rows(turns: Sequence[Turn]) -> list[Row]:
    """The rows, in the order of the first turns, by kind of prompts and batch."""
    base = {(t.turn, t.prompts, t.batch, t.weights): t.flow.speed for t in turns if t.configuration == NONE}
    keys = dict.fromkeys((t.prompts, t.batch, t.weights, t.configuration) for t in turns)
    out = []
    for key in sorted(keys, key=lambda key: (key[0], key[1], WEIGHTS.index(key[2]))):
        kind, batch, weights, configuration = key
        own = [t for t in turns if (t.prompts, t.batch, t.weights, t.configuration) == key]
        speeds = [t.flow.speed for t in own]
        ratios = [t.flow.speed / base[t.turn, kind, batch, target_of(weights)] for t in own]
        drafts = sum(t.flow.drafts for t in own)
        accepted = [sum(at) for at in zip_longest(*(t.flow.accepted for t in own), fillvalue=0)]
        out.append(
            Row(
                weights,
                configuration,
                kind,
                batch,
                statistics.median(speeds),
                min(speeds),
                max(speeds),
                statistics.median(ratios),
                1 + sum(accepted) / drafts if drafts else None,
                tuple(n / drafts for n in accepted) if drafts else (),
            )
        )
    return out


@dataclass(frozen=True)
class Derived:
    """What follows for one kind of prompts and batch; None where a configuration was not measured.

    Attributes:
        best: fixed length with the highest ratio.
        best_ratio: its ratio to none.
        adaptive: learned length / the better of none and the best fixed length.
        hybrid: hybrid drafts / the best fixed length of the head alone.
        compounding: gain of quantising and drafting together / product of their gains, each with its best fixed k.
        head_acceptance: mean acceptance length with the quantised head minus that with the BF16 head, same k.
    """

    weights: str
    prompts: str
    batch: int
    best: str | None
    best_ratio: float | None
    adaptive: float | None
    hybrid: float | None
    compounding: float | None
    head_acceptance: float | None


def derive(table: Iterable[Row]) -> list[Derived]:
    """The derived ratios, for each of the weights, kind of prompts and batch."""
    places: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in table:
        places.setdefault((row.weights, row.prompts, row.batch), {})[row.configuration] = row
    out = []
    for (weights, kind, batch), found in places.items():
        best, adaptive, hybrid = _best(found), found.get(ADAPTIVE), found.get(HYBRID)
        plain = _best(places.get(("bf16", kind, batch), {})) if weights == "nvfp4" else None
        mixed = places.get((MIXED, kind, batch), {}) if weights == "nvfp4" else {}
        pairs = [(row.length, mixed[name].length) for name, row in found.items() if name in mixed]
        gaps = [own - other for own, other in pairs if own is not None and other is not None]
        out.append(
            Derived(
                weights,
                kind,
                batch,
                best.configuration if best else None,
                best.ratio if best else None,
                adaptive.ratio / max(1.0, best.ratio) if adaptive and best else None,
                hybrid.ratio / best.ratio if hybrid and best else None,
                best.ratio / plain.ratio if plain and best else None,
                statistics.mean(gaps) if gaps else None,
            )
        )
    return out


def _best(found: Mapping[str, Row]) -> Row | None:
    """The fixed length with the highest ratio."""
    return max((row for name, row in found.items() if name.startswith("k=")), key=lambda r: r.ratio, default=None)

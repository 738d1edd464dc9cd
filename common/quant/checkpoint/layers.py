"""Which tensors of a checkpoint are quantised, and why the others are not; decided by names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fourfold.common.errors import FourfoldError
from fourfold.common.quant.checkpoint.reader import Checkpoint
from fourfold.common.quant.layers import FUSED, ROUTERS
from fourfold.common.quant.nvfp4 import BLOCK
from fourfold.common.quant.source import Source
from fourfold.common.tensor_index import FLOATS, FP8

_KEPT = (
    (re.compile(r"(^|\.)(embed|wte|wpe|tok_embeddings|word_embeddings)\w*$"), "an embedding"),
    (re.compile(r"(^|\.)(lm_head|embed_out|score|classifier)$"), "the output head"),
    (re.compile(r"(^|\.)(vision|visual|audio)\w*\."), "part of a vision or audio tower"),
    (re.compile(r"(^|\.)\w*norm\w*$"), "a norm"),
    (re.compile(r"(^|\.)\w*conv\w*$"), "a convolution"),
)


@dataclass(frozen=True)
class Choice:
    """What happens to the weights of a checkpoint.

    Attributes:
        quantised: layer names, in the order of the shards.
        kept: matrices that keep their dtype: layer name to reason.
    """

    quantised: tuple[str, ...]
    kept: dict[str, str]


def choose(checkpoint: Checkpoint, source: Source, ignore: Sequence[str]) -> Choice:
    """Decide on every matrix.

    Args:
        checkpoint: the source.
        source: its quantisation config.
        ignore: regular expressions on layer names.

    Raises:
        FourfoldError: a matrix has a dtype that cannot be read, nothing is left to quantise, or a part of a fused
            projection is ignored.
    """
    patterns = [_compiled(pattern) for pattern in ignore]
    quantised: list[str] = []
    kept: dict[str, str] = {}
    for tensor, entry in checkpoint.entries.items():
        name, _, kind = tensor.rpartition(".")
        if kind != "weight" or len(entry.shape) != 2:
            continue
        reason = next((why for pattern, why in _KEPT if pattern.search(name)), None)
        last = name.rpartition(".")[2]
        if last in ROUTERS or last.endswith("_gate"):
            reason = "a router, which stays exact"
        elif reason is None and any(pattern.search(name) for pattern in patterns):
            reason = "ignored by --ignore"
        elif reason is None and entry.shape[1] % BLOCK:
            reason = f"its inner dimension, {entry.shape[1]}, is no multiple of {BLOCK}"
        if reason is not None:
            kept[name] = reason
        elif entry.dtype not in FLOATS and entry.dtype != FP8:
            known = ", ".join(sorted(FLOATS | {FP8}))
            raise FourfoldError(
                f"{tensor} has dtype {entry.dtype}, expected one of {known}; leave it out with --ignore"
            )
        else:
            quantised.append(name)
    if not quantised:
        raise FourfoldError(f"{checkpoint.path} has no layer to quantise: {_summary(kept)}")
    _check_fused(quantised, kept)
    return Choice(tuple(quantised), kept)


def fused_with(name: str) -> tuple[str, ...]:
    """The names of the layers that an engine fuses with ``name``, itself among them."""
    parent, dot, last = name.rpartition(".")
    members = next((group for group in FUSED.values() if last in group), (last,))
    return tuple(f"{parent}{dot}{member}" for member in members)


def _check_fused(quantised: Sequence[str], kept: dict[str, str]) -> None:
    for name in quantised:
        for other in fused_with(name):
            if other in kept:
                raise FourfoldError(
                    f"{other} would keep its dtype ({kept[other]}) while {name} is quantised, but engines fuse them; "
                    "--ignore all of them or none"
                )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise FourfoldError(f"--ignore {pattern!r} is not a regular expression: {error}") from None


def _summary(kept: dict[str, str]) -> str:
    reasons = sorted(set(kept.values()))
    return (
        "; ".join(f"{sum(r == reason for r in kept.values())} {reason}" for reason in reasons) or "no matrices at all"
    )

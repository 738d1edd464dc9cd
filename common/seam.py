"""What a row of `fourfold.common.compat` is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Seam:
    """One attribute.

    Attributes:
        engine: vllm or sglang.
        path: ``module:name`` or ``module:Class.member``.
        parameters: names that a function must accept.
        why: what fourfold does with it.
        until: when the row goes away.
    """

    engine: str
    path: str
    why: str
    parameters: tuple[str, ...] = ()
    until: str = "official extension point; stays"


def vllm(path: str, why: str, parameters: tuple[str, ...] = (), until: str = Seam.until) -> Seam:
    """One of ``vllm``."""
    return Seam("vllm", f"vllm.{path}", why, parameters, until)


def sglang(path: str, why: str, parameters: tuple[str, ...] = (), until: str = Seam.until) -> Seam:
    """One of ``sglang.srt``."""
    return Seam("sglang", f"sglang.srt.{path}", why, parameters, until)

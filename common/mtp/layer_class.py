"""What both engines' generic heads build on: the decoder layer class of a target, found and called by its signature."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fourfold.common.errors import FourfoldError


def decoder_layer(target: type) -> type[Any]:
    """The decoder layer class of a model class: the one ``*DecoderLayer`` of its module or of a base class's module.

    Raises:
        FourfoldError: there is none, or more than one; names what was found.
    """
    for base in target.__mro__:
        defined = vars(sys.modules[base.__module__]).values()
        layers = {c for c in defined if isinstance(c, type) and c.__name__.endswith("DecoderLayer")}
        layers = {c for c in layers if c.__module__ == base.__module__}
        if len(layers) == 1:
            return layers.pop()
        if layers:
            names = ", ".join(sorted(c.__name__ for c in layers))
            raise FourfoldError(f"{target.__name__} has layers of several kinds ({names}); FourfoldMTP knows one kind")
    raise FourfoldError(
        f"{target.__module__} has no class *DecoderLayer for FourfoldMTP to build a head of {target.__name__} with"
    )


def arguments(function: Callable[..., Any], offered: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those of ``offered`` that ``function`` takes.

    Raises:
        FourfoldError: it needs another one.
    """
    parameters = [
        p for p in inspect.signature(function).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in (*offered, "self")]
    if missing:
        raise FourfoldError(f"{name} needs {', '.join(missing)}, which FourfoldMTP does not know")
    return {p.name: offered[p.name] for p in parameters if p.name in offered}


@contextmanager
def without_feed_forward(layer: nn.Module) -> Iterator[None]:
    """Leave a decoder layer's feed-forward part out: its KV cache is the same without, and its output is void."""
    part = getattr(layer, "mlp", None)
    if part is None:
        yield
        return
    layer.mlp = _Skipped(part)
    try:
        yield
    finally:
        layer.mlp = part


class FillsCache:
    """What a head has in common that can fill its KV cache and compute nothing else."""

    _filling_cache = False

    @contextmanager
    def filling_cache(self) -> Iterator[None]:
        """Let `forward` fill the KV cache and compute nothing else, for positions from which nothing is drafted."""
        self._filling_cache = True
        try:
            yield
        finally:
            self._filling_cache = False


class _Skipped(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = (part,)  # no submodule

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """The input as it came; one that an engine quantised beforehand has another shape than the output."""
        return hidden_states if isinstance(hidden_states, Tensor) else self.part[0](hidden_states, *args, **kwargs)

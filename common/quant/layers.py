"""What is served in NVFP4 and by which backend: one `LayerPlan` for each model, shared by both engine bindings.

An engine binding does, for each model it loads:

1. ``plan = plan_for(model, config, settings, fused)`` (`fourfold.common.quant.plan`).
2. For each linear layer, before its weights exist: ``plan.decide(prefix, columns)``. None means: keep the layer in the
   model's dtype. Otherwise a `LayerDecision`, with which it creates a `LoadedLayer` (`fourfold.common.quant.loading`),
   whose ``create`` makes the parameters that the checkpoint has.
3. When the last of them is loaded, they turn into ``layer.fourfold``, and ``layer.fourfold(x, bias)`` is the layer.
   When the last expected layer is prepared, the plan logs one line for each backend in use.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.log import get_logger
from fourfold.common.quant import backends, nvfp4
from fourfold.common.quant.backends.base import Backend, LayerSpec, PreparedLinear, Scheme
from fourfold.common.quant.linear import NvFp4Linear
from fourfold.common.quant.source import Layout, Source
from fourfold.common.settings import QuantSettings

FUSED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
ROUTERS = ("gate", "router")  # the last component of a router's name; also any name that ends in _gate


@dataclass(frozen=True)
class LayerDecision:
    """One layer to be served in NVFP4.

    Attributes:
        prefix: the engine's name of the layer.
        names: checkpoint names of its shards (one, for a layer that is not fused).
        scheme: what to serve.
        declared: what the checkpoint declares, hence which tensors it holds; None where it is not NVFP4.
    """

    prefix: str
    names: tuple[str, ...]
    scheme: Scheme
    declared: Scheme | None


@dataclass
class LayerPlan:
    """Decides what is quantised in one model, and reports it.

    Attributes:
        source: the checkpoint's declaration.
        settings: the user's options.
        fused: fused module name to checkpoint names, from the engine.
        importance: mean square of each input channel by checkpoint name, float32 ``[K]``; empty where there is none.
        importance_origin: where the statistics come from, for the log.
    """

    source: Source
    settings: QuantSettings
    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    importance_origin: str | None = None

    def __post_init__(self) -> None:
        self._waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self._served: dict[tuple[Scheme, str, tuple[tuple[str, str], ...]], Counter[str]] = {}
        self._kept: dict[str, Counter[str]] = {}
        self._unweighted = 0
        self.loading = False  # whether any tensor has come from a checkpoint
        self.log = get_logger(__name__)

    def names(self, prefix: str) -> tuple[str, ...]:
        """The checkpoint names of the shards of ``prefix``."""
        parent, _, last = prefix.rpartition(".")
        members = self.fused.get(last) or FUSED.get(last) or (last,)
        return tuple(f"{parent}.{member}" if parent else member for member in members)

    def decide(self, prefix: str, columns: int, count: bool = True) -> LayerDecision | None:
        """Decide on a linear layer.

        Args:
            prefix: the engine's name.
            columns: inputs of this rank's partition.
            count: whether the layer is about to be created, and counts for the log.

        Returns:
            The decision, or None to keep the layer in the model's dtype (counted for the log).

        Raises:
            FourfoldError: the shards of a fused layer are declared differently, or a checkpoint's layer is split over
                ranks within a block.
        """
        if not count:
            return replace(self).decide(prefix, columns)
        names = self.names(prefix)
        if self.source.is_nvfp4:
            return self._decide_stored(prefix, names, columns)
        if any(self.source.ignores(name) for name in (*names, prefix)):
            return self.keep(prefix, "the checkpoint's ignore list")
        if any(self.settings.ignores(name) for name in (*names, prefix)):
            return self.keep(prefix, "the ignore setting")
        last = prefix.rpartition(".")[2]
        if last in ROUTERS or last.endswith("_gate"):
            return self.keep(prefix, "routers stay exact")
        if columns % nvfp4.BLOCK:
            return self.keep(prefix, f"{columns} inputs on a rank, no multiple of {nvfp4.BLOCK}")
        scheme = Scheme.W4A16 if self.settings.scheme == "auto" else Scheme(self.settings.scheme)
        return LayerDecision(prefix, names, scheme, None)

    def _decide_stored(self, prefix: str, names: tuple[str, ...], columns: int) -> LayerDecision | None:
        declared = {name: self.source.scheme_of(name) for name in names}
        if len(set(declared.values())) > 1:
            found = ", ".join(f"{name} {s.value if s else 'unquantised'}" for name, s in declared.items())
            raise FourfoldError(f"{prefix}: its shards are fused, but the checkpoint stores them differently: {found}")
        scheme = declared[names[0]]
        if scheme is None or self.source.ignores(prefix):
            return self.keep(prefix, "unquantised in the checkpoint")
        if columns % nvfp4.BLOCK:
            raise FourfoldError(
                f"{prefix}: tensor parallelism leaves {columns} inputs on a rank, no multiple of {nvfp4.BLOCK}, the "
                "NVFP4 block; use a smaller tensor parallel size"
            )
        wanted = scheme if self.settings.scheme == "auto" else Scheme(self.settings.scheme)
        return LayerDecision(prefix, names, wanted, scheme)

    def keep(self, prefix: str, reason: str) -> None:
        """Count a layer that stays in the model's dtype."""
        self._kept.setdefault(reason, Counter())[prefix.rpartition(".")[2]] += 1

    def expect(self, layer: Any) -> None:
        """Remember that ``layer`` (weakly held) will be prepared; the report waits for it."""
        self._waiting.add(layer)

    def statistics(self, decision: LayerDecision, shards: int) -> list[Tensor | None]:
        """The statistics of a layer's inputs for each of its shards; counts a layer that has none, for the log."""
        names = decision.names if len(decision.names) == shards else (decision.prefix,) * shards
        found = [self.importance.get(name) for name in names]
        if all(statistic is None for statistic in found):
            self._unweighted += 1
        return found

    def check_other(self, prefix: str, kind: str) -> None:
        """Take note of a layer that is not linear: experts keep the model's dtype.

        Raises:
            FourfoldError: the checkpoint stores the experts quantised.
        """
        if not any(word in kind for word in ("Expert", "MoE")):
            return
        stored = self.source.layout is not Layout.PLAIN
        if stored and not self.source.ignores(prefix) and not self.source.ignores(f"{prefix}.0.gate_proj"):
            raise FourfoldError(
                f"{prefix}: this version serves dense layers; the checkpoint stores its experts as "
                f"{self.source.layout.value}. Serve it with the engine's own method, or quantise the BF16 original"
            )
        self.keep(prefix, "experts are not quantised by this version")

    def prepare(self, layer: Any, decision: LayerDecision, linear: NvFp4Linear, dtype: torch.dtype) -> PreparedLinear:
        """Choose a backend for ``linear``, repack it, and log once all expected layers are prepared.

        Args:
            layer: the object given to `expect`.
            decision: the layer's decision.
            linear: its weights, on the device that will serve them.
            dtype: of the activations.

        Raises:
            FourfoldError: no backend serves the layer; the message names it and the reasons.
        """
        rows, columns = linear.shape
        spec = LayerSpec(rows, columns, dtype, linear.packed.device, decision.scheme)
        try:
            selection = backends.select(spec, self.settings.backend)
            module = selection.backend.prepare(linear, decision.scheme)
        except FourfoldError as error:
            raise FourfoldError(f"{decision.prefix}: {error}") from None
        for name, tensor in list(module.named_buffers(recurse=False)):
            # An engine's dummy loader and its state dicts know checkpoint tensors, not a backend's layout.
            module.register_buffer(name, tensor, persistent=False)
        key = (decision.scheme, describe(selection.backend), tuple(selection.refused.items()))
        self._served.setdefault(key, Counter())[decision.prefix.rpartition(".")[2]] += 1
        self._waiting.discard(layer)
        if not self._waiting:
            for line in self.report():
                self.log.info(line)
        return module

    def report(self) -> list[str]:
        """Return the lines that say what is served by what, and start counting anew."""
        lines = []
        for (scheme, backend, refused), kinds in self._served.items():
            reasons = "".join(f"; {name} refused: {reason}" for name, reason in refused)
            lines.append(
                f"fourfold: nvfp4 {scheme.value}, backend {backend} for {kinds.total()} layers ({_listed(kinds)}); "
                f"{self._origin()}{reasons}"
            )
        for reason, kinds in self._kept.items():
            lines.append(f"fourfold: {kinds.total()} layers keep the model's dtype ({_listed(kinds)}): {reason}")
        self._served, self._kept, self._unweighted = {}, {}, 0
        return lines

    def _origin(self) -> str:
        if self.source.is_nvfp4:
            return f"weights of the checkpoint ({self.source.layout.value})"
        method = f"quantised while loading, scales {self.settings.scales}"
        if self.importance and not self._unweighted:
            return f"{method}, weighted by {self.importance_origin}"
        if self.importance:
            return f"{method}, weighted by {self.importance_origin} except {self._unweighted} layers it does not have"
        return f"{method}, unweighted: `fourfold quantize` keeps more quality at the same speed, with statistics"


def describe(backend: Backend) -> str:
    """A backend's name, with what it found on this machine where it says so."""
    detail = getattr(backend, "detail", None)
    return f"{backend.name} ({detail})" if detail else backend.name


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(kinds)

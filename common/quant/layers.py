"""From an engine's layers to `NvFp4Linear` and a backend: the logic that both engine bindings share.

An engine binding does, for each model it loads:

1. ``source = read_source(hf_quantization_config)`` (`fourfold.common.quant.source`) and
   ``plan = LayerPlan(source, settings.quant, fused)``, where ``fused`` is the engine's map of fused module names to
   their checkpoint names (``qkv_proj`` and ``gate_up_proj`` are known without it).
2. For each linear layer, before its weights exist: ``plan.decide(prefix, columns)``. None means: keep the layer in the
   model's dtype. Otherwise a `LayerDecision`: create the parameters of ``source.layout`` (plus the input scale where
   ``decision.declared`` is W4A4) and call ``plan.expect(layer)``.
3. For each layer, once its parameters are loaded, build the `NvFp4Linear`: `from_nvfp4` for an NVFP4 checkpoint,
   ``plan.quantize`` for a plain one, ``plan.quantize`` of `dequantize_fp8_blocks` for an FP8 one. Under tensor
   parallelism pass ``reduce_max`` so that the global scales, hence the codes, are those of the whole matrix, and
   to a row-parallel layer the ``columns`` it holds.
4. ``module = plan.prepare(layer, decision, linear, dtype)``; drop the parameters; ``module(x, bias)`` is the layer.
   When the last expected layer is prepared, the plan logs one line for each backend in use.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.log import get_logger
from fourfold.common.quant import backends, nvfp4, quantizer
from fourfold.common.quant.backends.base import Backend, LayerSpec, PreparedLinear, Scheme
from fourfold.common.quant.linear import NvFp4Linear
from fourfold.common.quant.source import Layout, Source
from fourfold.common.settings import QuantSettings

FUSED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
ROUTERS = ("gate", "router")  # the last component of a router's name; also any name that ends in _gate

ReduceMax = Callable[[Tensor], Tensor]


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
        self.log = get_logger(__name__)

    def names(self, prefix: str) -> tuple[str, ...]:
        """The checkpoint names of the shards of ``prefix``."""
        parent, _, last = prefix.rpartition(".")
        members = self.fused.get(last) or FUSED.get(last) or (last,)
        return tuple(f"{parent}.{member}" if parent else member for member in members)

    def decide(self, prefix: str, columns: int) -> LayerDecision | None:
        """Decide on a linear layer.

        Args:
            prefix: the engine's name.
            columns: inputs of this rank's partition.

        Returns:
            The decision, or None to keep the layer in the model's dtype (counted for the log).

        Raises:
            FourfoldError: the shards of a fused layer are declared differently, or a checkpoint's layer is split over
                ranks within a block.
        """
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

    def quantize(
        self,
        decision: LayerDecision,
        shards: Sequence[Tensor],
        columns: slice = slice(None),
        reduce_max: ReduceMax | None = None,
    ) -> NvFp4Linear:
        """Quantise a loaded layer by the settings and the statistics; see `quantize_shards`.

        Args:
            decision: the layer's decision.
            shards: matrices ``[N_i, K]`` of this rank.
            columns: the inputs that this rank holds, of a row-parallel layer.
            reduce_max: the largest magnitudes over the ranks, under tensor parallelism.
        """
        names = decision.names
        if len(names) != len(shards):  # stored as one tensor
            names = tuple(f"{decision.prefix}[{index}]" for index in range(len(shards)))
            statistics = [self.importance.get(decision.prefix)] * len(shards)
        else:
            statistics = [self.importance.get(name) for name in names]
        if all(statistic is None for statistic in statistics):
            self._unweighted += 1
        weights = [None if statistic is None else statistic[columns] for statistic in statistics]
        return quantize_shards(shards, names, self.settings.scales, weights, reduce_max)

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
        return f"{method}, unweighted: `fourfold quantize` with its default statistics loses less quality, at the same speed"


def describe(backend: Backend) -> str:
    """A backend's name, with what it found on this machine where it says so."""
    detail = getattr(backend, "detail", None)
    return f"{backend.name} ({detail})" if detail else backend.name


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(kinds)


def from_nvfp4(
    layout: Layout,
    packed: Tensor,
    block_scales: Tensor,
    weight_global: Tensor,
    input_global: Tensor | None,
    shard_rows: Sequence[int],
    name: str,
) -> NvFp4Linear:
    """Describe the loaded parameters of an NVFP4 checkpoint.

    Args:
        layout: whose parameters these are; compressed-tensors stores the reciprocals of the global scales.
        packed: uint8 ``[N, K / 2]``.
        block_scales: float8_e4m3fn ``[N, K / 16]``.
        weight_global: float32 ``[S]``, as stored.
        input_global: float32 ``[S]``, as stored, or None.
        shard_rows: rows of each of the S shards.
        name: the layer, for messages.

    Raises:
        FourfoldError: a global scale is not positive and finite, or a block scale is NaN (also: was never loaded, where
            the engine created the parameters with NaN).
    """
    missing = bool((block_scales.view(torch.uint8) & 0x7F).eq(0x7F).any())
    if missing:
        raise FourfoldError(f"{name}: weight_scale has NaN, or the checkpoint lacks it; this layer is not NVFP4 there")
    scales = []
    for label, scale in (("weight", weight_global), ("input", input_global)):
        if scale is None:
            scales.append(None)
            continue
        scale = scale.detach().float().reshape(-1)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise FourfoldError(
                f"{name}: the {label} global scales are {scale.tolist()}, expected positive finite numbers; "
                "the checkpoint lacks them or is damaged"
            )
        scales.append(scale.reciprocal() if layout is Layout.COMPRESSED_TENSORS else scale.clone())
    weight_scales, input_scales = scales
    assert weight_scales is not None
    return NvFp4Linear(packed.detach(), block_scales.detach(), weight_scales, tuple(shard_rows), input_scales)


def quantize_shards(
    shards: Sequence[Tensor],
    names: Sequence[str],
    method: str,
    importance: Sequence[Tensor | None],
    reduce_max: ReduceMax | None = None,
) -> NvFp4Linear:
    """Quantise the shards of a layer, each under its own global scale.

    Args:
        shards: matrices ``[N_i, K]`` of this rank, floating point.
        names: a name for each shard, for messages.
        method: a name of `fourfold.common.settings.SCALE_METHODS`.
        importance: for each shard, mean squares of the inputs ``[K]``, or None.
        reduce_max: takes float32 ``[S]``, this rank's largest magnitudes, and returns the largest over all ranks that
            hold a part of the shards.

    Raises:
        FourfoldError: a shard that NVFP4 cannot hold; the message names it.
    """
    amax = torch.stack([shard.abs().amax().float() for shard in shards])
    if reduce_max is not None:
        amax = reduce_max(amax)
    scales = nvfp4.global_scale_of(amax)
    return NvFp4Linear.from_shards(
        [
            quantizer.quantize_weight(shard, name=name, method=method, importance=weights, global_scale=scale)
            for shard, name, weights, scale in zip(shards, names, importance, scales, strict=True)
        ]
    )


def dequantize_fp8_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int], name: str) -> Tensor:
    """Return float32 ``[N, K]`` of FP8 weights ``[N, K]`` and their block scales ``[ceil(N / B0), ceil(K / B1)]``.

    Raises:
        FourfoldError: the scales have another shape.
    """
    rows, columns = weight.shape
    expected = [-(-rows // block[0]), -(-columns // block[1])]
    if list(scales.shape) != expected:
        raise FourfoldError(f"{name}: expected block scales of shape {expected}, got {list(scales.shape)}")
    spread = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * spread

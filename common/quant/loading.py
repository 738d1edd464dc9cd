"""The tensors of one linear layer, from the engine's loader to a prepared module.

`parameter_specs` says which tensors a layer of the checkpoint has. `LoadedLayer` counts what the engine's loader brings
and, when the last one is there, builds the `NvFp4Linear`, prepares it and drops the parameters. Under tensor
parallelism the global scales, hence the codes, are those of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.quant import nvfp4, quantizer
from fourfold.common.quant.backends.base import Scheme
from fourfold.common.quant.layers import LayerDecision, LayerPlan
from fourfold.common.quant.linear import NvFp4Linear
from fourfold.common.quant.nvfp4 import BLOCK
from fourfold.common.quant.source import NVFP4_KEYS, Layout

ReduceMax = Callable[[Tensor], Tensor]


class ParameterSpec(NamedTuple):
    """One tensor of a layer; ``kind`` is weight, block, fp8_block or global (one number a shard)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class LoadedLayer:
    """The layer of one rank while it is being loaded.

    Attributes:
        plan, decision: of the model and of the layer.
        shard_rows: output rows of each shard on this rank.
        columns: the inputs of the whole matrix that this rank holds.
        dtype: of the activations.
        reduce_max: takes float32 ``[S]``, this rank's largest magnitudes, and returns the largest over all ranks that
            hold a part of the shards; None where one rank holds all.
    """

    plan: LayerPlan
    decision: LayerDecision
    shard_rows: tuple[int, ...]
    columns: slice
    dtype: torch.dtype
    reduce_max: ReduceMax | None = None
    _arrived: dict[str, set[Any]] = field(default_factory=dict)
    _done: bool = False

    def create(self, layer: Any, classes: Mapping[str, Callable[..., Any]], loader: Callable[..., None]) -> None:
        """Create the parameters on ``layer``; those of an NVFP4 checkpoint are NaN until they are loaded.

        Args:
            layer: the engine's layer.
            classes: the engine's parameter class for each kind of `ParameterSpec`.
            loader: the layer's own weight loader, called for each tensor that arrives.
        """
        if self.plan.source.block is not None:
            layer.weight_block_size = list(self.plan.source.block)  # the engines' loaders cut block scales by it
        for name, kind, shape, dtype in parameter_specs(self, self.dtype):
            data = torch.empty(shape, dtype=dtype)
            if kind == "block":
                data.view(torch.uint8).fill_(0x7F)
            elif kind == "global":
                data.fill_(torch.nan)
            place = {} if kind == "global" else {"input_dim": 1, "output_dim": 0}
            parameter = classes[kind](data=data, weight_loader=self._counting(layer, name, loader), **place)
            layer.register_parameter(name, parameter)
            self._arrived[name] = set()
        layer.fourfold_loaded = self
        self.plan.expect(layer)

    def _counting(self, layer: Any, name: str, loader: Callable[..., None]) -> Callable[..., None]:
        """The engine's ``loader``, which prepares the layer when its last tensor is there."""

        def load(param: Any, loaded_weight: Tensor, shard: Any = None) -> None:
            if self._done:
                raise FourfoldError(
                    f"{self.decision.prefix}.{name} is loaded a second time, after the layer was quantised; "
                    "start the engine again to load other weights"
                )
            loader(param, loaded_weight) if shard is None else loader(param, loaded_weight, shard)
            self._arrived[name].update(shard if isinstance(shard, tuple) else (shard,))
            self.plan.loading = True
            if not self._missing():
                self.prepare(layer)

        return load

    def _missing(self) -> list[str]:
        wanted = len(self.shard_rows)
        return [name for name, got in self._arrived.items() if None not in got and len(got) < wanted]

    def prepare(self, layer: Any) -> None:
        """Set ``layer.fourfold`` and drop the parameters; does nothing the second time.

        Raises:
            FourfoldError: tensors are missing or damaged, or no backend serves the layer; the message names it.
        """
        if self._done:
            return
        missing = self._missing()
        if missing and self.plan.loading:
            found = ", ".join(f"{self.decision.prefix}.{name}" for name in missing)
            raise FourfoldError(f"the checkpoint lacks {found} (or a shard of it)")
        tensors = {name: getattr(layer, name).data for name in self._arrived}
        layer.fourfold = self.plan.prepare(layer, self.decision, self._build(tensors), self.dtype)
        for name in tensors:
            delattr(layer, name)
        self._done = True

    def _build(self, tensors: dict[str, Tensor]) -> NvFp4Linear:
        source, name = self.plan.source, self.decision.prefix
        if not source.is_nvfp4:
            weight = tensors["weight"]
            if source.block is not None:
                weight = _dequantize(weight, tensors["weight_scale_inv"], self.shard_rows, source.block, name)
            return self._quantize(weight.split(self.shard_rows))
        found = [tensors.get(key) for key in NVFP4_KEYS[source.layout]]
        assert found[0] is not None and found[1] is not None and found[2] is not None
        return from_nvfp4(source.layout, found[0], found[1], found[2], found[3], self.shard_rows, name)

    def _quantize(self, shards: Sequence[Tensor]) -> NvFp4Linear:
        names = self.decision.names
        if len(names) != len(shards):  # stored as one tensor
            names = tuple(f"{self.decision.prefix}[{index}]" for index in range(len(shards)))
        whole = self.plan.statistics(self.decision, len(shards))
        statistics = [None if statistic is None else statistic[self.columns] for statistic in whole]
        return quantize_shards(shards, names, self.plan.settings.scales, statistics, self.reduce_max)


def parameter_specs(layer: LoadedLayer, dtype: torch.dtype) -> Iterator[ParameterSpec]:
    """The tensors that the checkpoint stores for a layer, in the shapes of this rank."""
    source, rows, shards = layer.plan.source, sum(layer.shard_rows), len(layer.shard_rows)
    columns = layer.columns.stop - layer.columns.start
    if source.layout is Layout.PLAIN:
        yield ParameterSpec("weight", "weight", (rows, columns), dtype)
    elif source.block is not None:
        down, across = source.block
        blocks = sum(-(-n // down) for n in layer.shard_rows), -(-columns // across)
        yield ParameterSpec("weight", "weight", (rows, columns), torch.float8_e4m3fn)
        yield ParameterSpec("weight_scale_inv", "fp8_block", blocks, torch.float32)
    else:
        packed, block_scales, weight_global, input_global = NVFP4_KEYS[source.layout]
        yield ParameterSpec(packed, "weight", (rows, columns // 2), torch.uint8)
        yield ParameterSpec(block_scales, "block", (rows, columns // BLOCK), torch.float8_e4m3fn)
        yield ParameterSpec(weight_global, "global", (shards,), torch.float32)
        if layer.decision.declared is Scheme.W4A4:
            yield ParameterSpec(input_global, "global", (shards,), torch.float32)


def _dequantize(weight: Tensor, scales: Tensor, shard_rows: Sequence[int], block: tuple[int, int], name: str) -> Tensor:
    counts = [-(-rows // block[0]) for rows in shard_rows]
    parts = zip(weight.split(list(shard_rows)), scales.split(counts), strict=True)
    return torch.cat([dequantize_fp8_blocks(part, scale, block, name) for part, scale in parts])


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
    amax = torch.stack([nvfp4.check_weight(shard, name) for shard, name in zip(shards, names, strict=True)])
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

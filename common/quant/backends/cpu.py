"""The ``cpu`` backends: packed weights in memory, decoded in registers by compiled kernels.

For W4A16 the kernels take activations as integers with a scale for each block of 16: ``cpu`` as int8, ``cpu_int16`` as
int16, which loses nothing against bfloat16 but is slower from about batch 4. For W4A4 they are the NVFP4 codes: exact.
For int16, and where the processor lacks AVX-512 VNNI, batches over `KERNEL_ROWS` decode tiles of the weight to bfloat16
(exact) and use torch's own matrix product.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor

from fourfold.common.quant import activations
from fourfold.common.quant.backends.base import Backend, LayerSpec, PreparedLinear, Requirements, Scheme
from fourfold.common.quant.linear import NvFp4Linear
from fourfold.common.quant.native import build
from fourfold.common.quant.nvfp4 import BLOCK

GROUP_ROWS = 16
BLOCK_BYTES = GROUP_ROWS * BLOCK // 2 + GROUP_ROWS
KERNEL_ROWS = 64  # more rows than this are prefill
CALL_ROWS = 256  # of activations in one call, so that they stay in a cache while the weights pass
TILE_BYTES = 8 << 20  # of decoded weights at a time
INT8, INT16, E2M1 = 0, 1, 2

_library: Any = None


def _kernels() -> Any:
    """The compiled kernels of the chosen instruction set, with their signatures."""
    global _library
    if _library is None:
        library = build.load("linear", build.chosen_isa())
        pointer, integer, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        library.fourfold_linear.argtypes = (
            *(pointer, integer, integer, pointer, integer, integer, integer),
            *(pointer, pointer, pointer, flag, pointer, flag),
        )
        library.fourfold_pack.argtypes = (pointer, pointer, integer, integer, pointer)
        library.fourfold_unpack.argtypes = (pointer, integer, integer, integer, pointer)
        for name in ("fourfold_linear", "fourfold_pack", "fourfold_unpack"):
            getattr(library, name).restype = None
        _library = library
    return _library


def pack(linear: NvFp4Linear) -> Tensor:
    """Repack a layer for the kernels: uint8, groups of 16 rows by blocks of 16 columns, 144 bytes each."""
    rows, columns = linear.shape
    codes, scales = linear.packed.contiguous(), linear.block_scales.view(torch.uint8).contiguous()
    out = torch.empty(-(-rows // GROUP_ROWS) * (columns // BLOCK) * BLOCK_BYTES, dtype=torch.uint8)
    _kernels().fourfold_pack(codes.data_ptr(), scales.data_ptr(), rows, columns, out.data_ptr())
    return out


def unpack(packed: Tensor, columns: int, first: int, last: int) -> Tensor:
    """Return rows ``first`` (a multiple of 16) to ``last`` as bfloat16 ``e2m1 * block_scale``, exactly."""
    out = torch.empty(last - first, columns, dtype=torch.bfloat16)
    _kernels().fourfold_unpack(packed.data_ptr(), columns, first, last, out.data_ptr())
    return out


def _linear(
    x: Tensor,
    packed: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
    input_scales: Tensor | None,
    shard_rows: list[int],
    mode: int,
) -> Tensor:
    """The operator ``fourfold::nvfp4_linear`` on a CPU; see `CpuLinear`."""
    rows, outputs, columns = x.shape[0], row_scales.shape[0], x.shape[1]
    if x.dtype not in (torch.bfloat16, torch.float32):
        return _linear(x.float(), packed, row_scales, bias, input_scales, shard_rows, mode).to(x.dtype)
    if rows > KERNEL_ROWS and (mode == INT16 or build.chosen_isa() != "avx512_vnni"):
        return _large(x, packed, row_scales, bias, input_scales, shard_rows, mode)
    x = x.contiguous()
    y = torch.empty(rows, outputs, dtype=x.dtype)
    if bias is not None and bias.dtype is not torch.float32:
        bias = bias.float()
    call = _kernels().fourfold_linear
    size = x.element_size()
    for at in range(0, rows, CALL_ROWS):
        count, source, target = min(CALL_ROWS, rows - at), x.data_ptr() + at * columns * size, y.data_ptr()
        first, scale_at = 0, input_scales.data_ptr() if input_scales is not None else None
        for last in itertools.accumulate(shard_rows):
            call(
                *(source, count, columns, packed.data_ptr(), outputs, first, last, row_scales.data_ptr()),
                *(None if bias is None else bias.data_ptr(), target + at * outputs * size),
                *(mode, scale_at, x.dtype is torch.bfloat16),
            )
            first, scale_at = last, None if scale_at is None else scale_at + 4
    return y


def _large(
    x: Tensor,
    packed: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
    input_scales: Tensor | None,
    shard_rows: list[int],
    mode: int,
) -> Tensor:
    """Decode tiles of the weight and multiply with the library, in x's dtype."""
    columns = x.shape[1]
    y = torch.empty(x.shape[0], row_scales.shape[0], dtype=x.dtype)
    tile = max(GROUP_ROWS, TILE_BYTES // (2 * columns) // GROUP_ROWS * GROUP_ROWS)
    begin = 0
    for shard, size in enumerate(shard_rows):
        end, inputs = begin + size, x
        token: Tensor | None = None
        if mode == E2M1:
            inputs, token = activations.quantized_values(x, None if input_scales is None else input_scales[shard])
            inputs = inputs.to(x.dtype)
        for first in range(begin // GROUP_ROWS * GROUP_ROWS, end, tile):
            last = min(first + tile, end)
            weight = unpack(packed, columns, first, last)
            if x.dtype is not torch.bfloat16:
                weight = weight.to(x.dtype)
            start = max(first, begin)
            part = (inputs @ weight.t())[:, start - first :].float() * row_scales[start:last]
            if token is not None:
                part *= token
            if bias is not None:
                part += bias[start:last]
            y[:, start:last] = part
        begin = end
    return y


_OPERATORS = torch.library.Library("fourfold", "DEF")
_OPERATORS.define(
    "nvfp4_linear(Tensor x, Tensor packed, Tensor row_scales, Tensor? bias, Tensor? input_scales, int[] shard_rows, "
    "int mode) -> Tensor"
)
_OPERATORS.impl("nvfp4_linear", _linear, "CPU")


@torch.library.register_fake("fourfold::nvfp4_linear", lib=_OPERATORS)
def _fake(x: Tensor, packed: Tensor, row_scales: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], row_scales.shape[0])


class CpuLinear(PreparedLinear):
    """A layer in the kernels' layout: ``packed`` (see `pack`) and one float32 global scale for each output row."""

    packed: Tensor
    row_scales: Tensor
    input_scales: Tensor | None

    def __init__(self, linear: NvFp4Linear, mode: int) -> None:
        super().__init__()
        self.mode = mode
        scales = linear.input_scales if mode == E2M1 else None
        shards = list(linear.shard_rows)
        if scales is None or bool((scales == scales[0]).all()):
            shards = [linear.shape[0]]  # one quantisation of the activations serves all
            scales = None if scales is None else scales[:1]
        self.shard_rows = shards
        self.register_buffer("packed", pack(linear))
        self.register_buffer("row_scales", linear.row_scales().float().contiguous())
        self.register_buffer("input_scales", None if scales is None else scales.float().contiguous())

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(x.numel() // x.shape[-1], x.shape[-1])
        out = torch.ops.fourfold.nvfp4_linear(
            rows, self.packed, self.row_scales, bias, self.input_scales, self.shard_rows, self.mode
        )
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self.row_scales.shape[0])


class CpuBackend(Backend):
    """Compiled kernels for AVX-512 VNNI, AVX2 and, in portable C++, any other processor.

    Args:
        name: ``cpu`` or ``cpu_int16``.
        mode: how W4A16 takes its activations.
    """

    requires = Requirements(devices=("cpu",), dtypes=(torch.bfloat16, torch.float16, torch.float32))

    def __init__(self, name: str, mode: int) -> None:
        self.name = name
        self.mode = mode

    @property
    def detail(self) -> str:
        """What serves here: instruction set and activations."""
        return f"{build.chosen_isa()}, {'int8' if self.mode == INT8 else 'int16'} activations for w4a16"

    def refuse(self, spec: LayerSpec) -> str | None:
        reason = super().refuse(spec)
        if reason is None:
            try:
                _kernels()
            except build.NativeUnavailable as error:
                return str(error)
        return reason

    def prepare(self, linear: NvFp4Linear, scheme: Scheme) -> PreparedLinear:
        return CpuLinear(linear, E2M1 if scheme is Scheme.W4A4 else self.mode)

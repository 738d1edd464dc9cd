"""The compiled quantiser: one pass over a weight, block scales chosen and codes packed."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fourfold.common.quant.native import build
from fourfold.common.quant.scales import WINDOW


@cache
def library() -> Any:
    """The compiled functions.

    Raises:
        NativeUnavailable: they cannot be compiled here.
    """
    found = build.load("quantize", build.chosen_isa())
    pointer, integer, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.fourfold_quantize.argtypes = (
        *(pointer, flag, integer, integer, integer, ctypes.c_float),
        *(pointer, flag, flag, flag, pointer, pointer),
    )
    found.fourfold_quantize.restype = None
    return found


def quantize(weight: Tensor, global_scale: float, method: str, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return packed codes uint8 ``[N, K / 2]`` and block scales float8_e4m3fn ``[N, K / 16]``.

    Args:
        weight: ``[N, K]`` on the CPU, finite, K a multiple of 16.
        global_scale: positive.
        method: one of `fourfold.common.settings.SCALE_METHODS`.
        importance: positive weights ``[K]``, or None.
    """
    if weight.dtype not in (torch.bfloat16, torch.float32):
        weight = weight.float()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    block_scales = torch.empty(rows, columns // 16, dtype=torch.uint8)
    weighted = importance is not None and method == "sweep"
    low, high = WINDOW[weighted] if method == "sweep" else (0, 0)
    weighting = importance.float().contiguous() if importance is not None and weighted else None
    library().fourfold_quantize(
        *(weight.data_ptr(), weight.dtype is torch.bfloat16, rows, columns, weight.stride(0), global_scale),
        *(None if weighting is None else weighting.data_ptr(), low, high, method == "four_over_six"),
        *(packed.data_ptr(), block_scales.data_ptr()),
    )
    return packed, block_scales.view(torch.float8_e4m3fn)

"""How the block scales of a weight are chosen: the PyTorch that defines the compiled quantiser.

All methods keep the global scale at amax / 2688 and return E4M3 scales, so the result is an ordinary NVFP4 tensor.

absmax         the code nearest to amax / 6.
four_over_six  amax / 6 or amax / 4, whichever has the smaller squared error (arXiv 2512.02010).
sweep          the code with the least squared error in a window around that of amax / 6 (arXiv 2606.07618):
               [0, +7] codes, or [-8, +7] where the error is weighted by the mean square of each input channel,
               the diagonal of the layer's Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fourfold.common.quant import e2m1
from fourfold.common.quant.nvfp4 import BLOCK, absmax_block_scales, clamp_block_scales

MIN_CODE, MAX_CODE = 1, 126  # of the positive finite E4M3 numbers, in order of size
WINDOW = {False: (0, 7), True: (-8, 7)}  # codes around amax / 6; by whether the error is weighted


def choose_block_scales(weight: Tensor, global_scale: Tensor, method: str, importance: Tensor | None) -> Tensor:
    """Return float8_e4m3fn block scales ``[N, K / 16]``.

    Args:
        weight: float32 ``[N, K]``, finite.
        global_scale: float32 scalar.
        method: one of `fourfold.common.settings.SCALE_METHODS`.
        importance: float32 ``[K]``, not negative: weight of each input channel's squared error. Only for sweep.
    """
    nearest = absmax_block_scales(weight, global_scale)
    if method == "absmax":
        return nearest
    rows = weight.shape[0]
    blocks = weight.view(rows, -1, BLOCK)
    weighting = None if importance is None or method != "sweep" else importance.float().view(1, -1, BLOCK)
    best = nearest.view(torch.uint8).clone()
    least = torch.full(best.shape, torch.inf, device=weight.device)
    for codes in _candidates(blocks, nearest, global_scale, method, weighting is not None):
        step = (codes.view(torch.float8_e4m3fn).float() * global_scale).unsqueeze(-1)
        error = (blocks - e2m1.decode(e2m1.encode(blocks / step)) * step).square()
        total = (error if weighting is None else error * weighting).sum(-1)
        better = total < least
        least = torch.where(better, total, least)
        best = torch.where(better, codes, best)
    zero = (blocks == 0).all(-1)
    return best.masked_fill(zero, 0x38).view(torch.float8_e4m3fn)  # 0x38 is 1


def _candidates(blocks: Tensor, nearest: Tensor, global_scale: Tensor, method: str, weighted: bool) -> Iterator[Tensor]:
    """Yield uint8 codes ``[N, K / 16]`` to try; of equal errors the first holds."""
    codes = nearest.view(torch.uint8)
    if method == "four_over_six":
        yield codes
        yield clamp_block_scales(blocks.abs().amax(-1) / 4.0 / global_scale).to(torch.float8_e4m3fn).view(torch.uint8)
        return
    low, high = WINDOW[weighted]
    for offset in range(low, high + 1):
        yield (codes.to(torch.int16) + offset).clamp(MIN_CODE, MAX_CODE).to(torch.uint8)

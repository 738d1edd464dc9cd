"""NVFP4: E2M1 codes in blocks of 16 along the input dimension, E4M3 block scales, one FP32 global scale.

A weight is ``e2m1 * block_scale * global_scale``. `NvFp4Tensor` holds one such matrix with one global scale;
`encode` rounds a matrix to given block scales, whoever chose them (`fourfold.common.quant.scales`).
Block scales are in [2^-9, 448]; a block of zeros has scale 1 (the convention of NVIDIA ModelOpt).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.quant import e2m1

BLOCK = 16
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
GLOBAL_DIVISOR = e2m1.MAX * E4M3_MAX  # 2688: the global scale puts the largest block scale at E4M3's maximum


@dataclass(frozen=True)
class NvFp4Tensor:
    """One NVFP4 matrix of shape ``[N, K]``.

    Attributes:
        packed: uint8 ``[N, K / 2]``, low nibble first.
        block_scales: float8_e4m3fn ``[N, K / 16]``, positive.
        global_scale: float32 scalar that multiplies.
    """

    packed: Tensor
    block_scales: Tensor
    global_scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)`` of the dequantised matrix."""
        return self.packed.shape[0], self.packed.shape[1] * 2

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix ``[N, K]``: products in float32, rounded once to ``dtype``."""
        rows, columns = self.shape
        values = e2m1.decode(e2m1.unpack(self.packed)).view(rows, columns // BLOCK, BLOCK)
        scaled = values * self.block_scales.float().unsqueeze(-1) * self.global_scale
        return scaled.view(rows, columns).to(dtype)


def check_weight(weight: Tensor, name: str) -> Tensor:
    """Refuse what NVFP4 cannot hold; return the largest magnitude, float32 scalar.

    Raises:
        FourfoldError: not a matrix, an inner dimension that is no multiple of 16, not floating point,
            or a NaN or infinity; the message names the tensor.
    """
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise FourfoldError(f"{name}: expected a matrix [N, K], got shape {list(weight.shape)}")
    if not weight.is_floating_point():
        raise FourfoldError(f"{name}: expected a floating-point tensor, got {weight.dtype}")
    if weight.shape[1] % BLOCK or weight.shape[1] == 0:
        raise FourfoldError(
            f"{name}: inner dimension {weight.shape[1]} is not a positive multiple of {BLOCK}, the NVFP4 block; "
            "leave this layer in its own dtype (ignore)"
        )
    low, high = torch.aminmax(weight)
    amax = torch.maximum(low.abs(), high.abs()).float()
    if not bool(torch.isfinite(amax)):
        bad = int((~torch.isfinite(weight)).sum())
        raise FourfoldError(
            f"{name}: {bad} of {weight.numel()} values are NaN or infinite; NVFP4 has neither, repair the source"
        )
    return amax


def global_scale_of(amax: Tensor) -> Tensor:
    """Return the float32 global scale ``amax / 2688`` (1 for a matrix of zeros)."""
    scale = amax.float() / GLOBAL_DIVISOR
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def absmax_block_scales(weight: Tensor, global_scale: Tensor) -> Tensor:
    """Return the E4M3 block scales nearest to ``block amax / 6 / global_scale``.

    Args:
        weight: float32 ``[N, K]``.
        global_scale: float32 scalar or ``[N, 1]`` (one for each row, for activations).

    Returns:
        float8_e4m3fn ``[N, K / 16]``.
    """
    amax = weight.view(weight.shape[0], -1, BLOCK).abs().amax(dim=-1)
    return clamp_block_scales(amax / e2m1.MAX / global_scale).masked_fill(amax == 0, 1.0).to(torch.float8_e4m3fn)


def clamp_block_scales(scales: Tensor) -> Tensor:
    """Clamp float32 block scales to the positive range of E4M3, [2^-9, 448]."""
    return scales.clamp(E4M3_MIN, E4M3_MAX)


def encode(weight: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    """Round a matrix to E2M1 under the given scales.

    Args:
        weight: float32 ``[N, K]``.
        block_scales: float8_e4m3fn ``[N, K / 16]``.
        global_scale: float32 scalar or ``[N, 1]``.

    Returns:
        Packed codes, uint8 ``[N, K / 2]``.
    """
    rows, columns = weight.shape
    step = (block_scales.float() * global_scale).unsqueeze(-1)
    scaled = weight.view(rows, columns // BLOCK, BLOCK) / step
    return e2m1.pack(e2m1.encode(scaled).view(rows, columns))

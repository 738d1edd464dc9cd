"""NVFP4 activations (W4A4): what a Blackwell kernel feeds its matrix product.

Activations are quantised along the input dimension like weights, with the block scale nearest to
``block amax / 6``. The global scale is static (calibrated, from the checkpoint) or ``amax / 2688`` of each token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.common.quant import e2m1, nvfp4


def quantize_activations(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise activations.

    Args:
        x: ``[M, K]``, floating point, K a multiple of 16.
        input_scale: static global scale, float32 scalar, or None for one scale a token.

    Returns:
        packed codes uint8 ``[M, K / 2]``, block scales float8_e4m3fn ``[M, K / 16]`` and global scales float32
        ``[M, 1]``.
    """
    x = x.float()
    if input_scale is None:
        global_scale = nvfp4.global_scale_of(x.abs().amax(dim=-1, keepdim=True))
    else:
        global_scale = input_scale.float().reshape(1, 1).expand(x.shape[0], 1)
    block_scales = nvfp4.absmax_block_scales(x, global_scale)
    return nvfp4.encode(x, block_scales, global_scale), block_scales, global_scale


def quantized_values(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what the codes and block scales of ``x [M, K]`` stand for, and the global scales to multiply with.

    Returns:
        float32 ``[M, K]`` (exact in bfloat16) and float32 ``[M, 1]``.
    """
    packed, block_scales, global_scale = quantize_activations(x, input_scale)
    values = e2m1.decode(e2m1.unpack(packed)).view(x.shape[0], -1, nvfp4.BLOCK)
    return (values * block_scales.to(torch.float32).unsqueeze(-1)).view(x.shape), global_scale


def fake_quantize(x: Tensor, input_scale: Tensor | None) -> Tensor:
    """Return ``x`` after a round trip through NVFP4, float32 ``[M, K]``."""
    values, global_scale = quantized_values(x, input_scale)
    return values * global_scale

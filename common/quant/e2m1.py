"""E2M1: the 4-bit float of NVFP4 and MXFP4.

A code is ``sign << 3 | exponent << 1 | mantissa``; the magnitudes of codes 0 to 7 are `MAGNITUDES`.
Encoding rounds to nearest, ties to the even code, and saturates at 6, as PTX
``cvt.rn.satfinite.e2m1x2.f32`` does. Two codes share a byte; the low nibble is the even index.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MAX = 6.0

# A magnitude x has the code that counts the bounds it passes. A tie lies on a bound and goes to the even
# code, so a bound below an odd code is exclusive and one below an even code is inclusive.
_EXCLUSIVE_BOUNDS = (0.25, 1.25, 2.5, 5.0)  # into codes 1, 3, 5, 7
_INCLUSIVE_BOUNDS = (0.75, 1.75, 3.5)  # into codes 2, 4, 6


def encode(values: Tensor) -> Tensor:
    """Return the nearest E2M1 codes.

    Args:
        values: any shape, floating point, without NaN (infinities saturate).

    Returns:
        uint8 codes 0 to 15 of the same shape. Zero keeps its sign bit, as the hardware conversion does.
    """
    magnitude = values.abs()
    code = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for bound in _EXCLUSIVE_BOUNDS:
        code += magnitude > bound
    for bound in _INCLUSIVE_BOUNDS:
        code += magnitude >= bound
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """Return the float32 values of uint8 codes 0 to 15 (any shape)."""
    table = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), device=codes.device)
    return table[codes.long()]


def pack(codes: Tensor) -> Tensor:
    """Pack uint8 codes ``[..., K]`` (K even) into bytes ``[..., K / 2]``, low nibble first."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Unpack bytes ``[..., K / 2]`` into uint8 codes ``[..., K]``; the inverse of `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)

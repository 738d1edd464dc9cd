"""The reference backend: plain PyTorch on any device.

Weights are kept as ``e2m1 * block_scale`` in bfloat16, which is exact (six significant bits); the product and the
global scales are float32. It defines the result that the faster backends are tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.common.quant import activations
from fourfold.common.quant.backends.base import Backend, PreparedLinear, Scheme
from fourfold.common.quant.linear import NvFp4Linear
from fourfold.common.quant.nvfp4 import NvFp4Tensor


class ReferenceLinear(PreparedLinear):
    """Dequantised weights ``[N, K]`` without their global scales, which multiply the output rows."""

    def __init__(self, linear: NvFp4Linear, scheme: Scheme) -> None:
        super().__init__()
        one = torch.ones((), device=linear.packed.device)
        self.scheme = scheme
        self.shard_rows = linear.shard_rows
        self.register_buffer("weight", NvFp4Tensor(linear.packed, linear.block_scales, one).dequantize(torch.bfloat16))
        self.register_buffer("row_scales", linear.row_scales())
        self.register_buffer("input_scales", linear.input_scales)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
        if self.scheme is Scheme.W4A16:
            out = rows.float() @ self.weight.float().t()
        elif self.input_scales is None:
            out = activations.fake_quantize(rows, None) @ self.weight.float().t()
        else:
            out = torch.cat(
                [
                    activations.fake_quantize(rows, scale) @ weight.float().t()
                    for weight, scale in zip(self.weight.split(self.shard_rows), self.input_scales, strict=True)
                ],
                dim=-1,
            )
        out = out * self.row_scales
        if bias is not None:
            out = out + bias.float()
        return out.to(x.dtype).view(*x.shape[:-1], self.row_scales.shape[0])


class ReferenceBackend(Backend):
    """Serves every layer everywhere, slowly."""

    name = "reference"

    def prepare(self, linear: NvFp4Linear, scheme: Scheme) -> PreparedLinear:
        return ReferenceLinear(linear, scheme)

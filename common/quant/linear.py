"""The one description of a quantised linear layer, between checkpoints, engines and backends.

A layer is one NVFP4 matrix whose rows are the outputs of one or more shards (q, k and v; gate and up).
Every shard keeps its own global scale: a block scale is relative to the global scale it was chosen under, so
collapsing the global scales of a fused layer to one number rescales the other shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.quant.nvfp4 import BLOCK, NvFp4Tensor


@dataclass(frozen=True)
class NvFp4Linear:
    """A linear layer ``y = x W^T`` with W of shape ``[N, K]``.

    Attributes:
        packed: uint8 ``[N, K / 2]``, low nibble first.
        block_scales: float8_e4m3fn ``[N, K / 16]``.
        global_scales: float32 ``[S]``, one for each shard, multiplied.
        shard_rows: rows of each shard, S numbers that sum to N.
        input_scales: float32 ``[S]``, the static global scales of the activations (``amax / 2688``), or None
            where activations are not quantised or are scaled for each token.
    """

    packed: Tensor
    block_scales: Tensor
    global_scales: Tensor
    shard_rows: tuple[int, ...]
    input_scales: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        shards = len(self.shard_rows)
        if self.packed.dtype != torch.uint8:
            raise FourfoldError(f"packed codes: expected uint8, got {self.packed.dtype}")
        if self.block_scales.dtype != torch.float8_e4m3fn:
            raise FourfoldError(f"block scales: expected float8_e4m3fn, got {self.block_scales.dtype}")
        if tuple(self.block_scales.shape) != (rows, columns // BLOCK) or columns % BLOCK:
            raise FourfoldError(
                f"block scales: expected shape {[rows, columns // BLOCK]} for a weight of "
                f"{[rows, columns]}, got {list(self.block_scales.shape)}"
            )
        if sum(self.shard_rows) != rows:
            raise FourfoldError(f"shards of {list(self.shard_rows)} rows do not add up to {rows} rows")
        for label, scales in (("global", self.global_scales), ("input", self.input_scales)):
            if scales is not None and tuple(scales.shape) != (shards,):
                raise FourfoldError(f"{label} scales: expected {shards}, one a shard, got {list(scales.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        return self.packed.shape[0], self.packed.shape[1] * 2

    @classmethod
    def from_shards(cls, shards: Sequence[NvFp4Tensor], input_scales: Tensor | None = None) -> NvFp4Linear:
        """Stack shards along the output dimension, each with its own global scale."""
        return cls(
            packed=torch.cat([s.packed for s in shards]),
            block_scales=torch.cat([s.block_scales for s in shards]),
            global_scales=torch.stack([s.global_scale.reshape(()) for s in shards]),
            shard_rows=tuple(s.shape[0] for s in shards),
            input_scales=input_scales,
        )

    def shards(self) -> list[NvFp4Tensor]:
        """Return the shards, as views."""
        codes = self.packed.split(self.shard_rows)
        scales = self.block_scales.split(self.shard_rows)
        return [NvFp4Tensor(c, s, g) for c, s, g in zip(codes, scales, self.global_scales, strict=True)]

    def row_scales(self) -> Tensor:
        """Return float32 ``[N]``: the global scale of each output row."""
        rows = torch.tensor(self.shard_rows, device=self.global_scales.device)
        return self.global_scales.repeat_interleave(rows)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return W as ``[N, K]``, exact shard by shard, rounded once to ``dtype``."""
        return torch.cat([s.dequantize(dtype) for s in self.shards()])

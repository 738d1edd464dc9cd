"""Read the tensors of a checkpoint of safetensors shards."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.tensor_index import TensorIndex


class Checkpoint(TensorIndex):
    """A model directory whose tensors can be read."""

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            FourfoldError: the checkpoint has no such tensor.
        """
        if name not in self.entries:
            raise FourfoldError(f"{self.path} has no tensor {name}")
        with safe_open(self.path / self.entries[name].shard, "pt") as shard:
            return shard.get_tensor(name)

    def weight(self, name: str, block: tuple[int, int] | None) -> Tensor:
        """Read the weight of the layer ``name``; an FP8 one is multiplied by its block scales (float32).

        Raises:
            FourfoldError: an FP8 weight without scales, or scales that do not fit.
        """
        from fourfold.common.quant.loading import dequantize_fp8_blocks

        weight = self.tensor(f"{name}.weight")
        if weight.dtype is not torch.float8_e4m3fn:
            return weight
        if block is None or f"{name}.weight_scale_inv" not in self.entries:
            raise FourfoldError(f"{name}.weight is FP8 without block scales (weight_scale_inv); its values are unknown")
        return dequantize_fp8_blocks(weight, self.tensor(f"{name}.weight_scale_inv"), block, name)

"""SGLang's linear layers under ``fourfold_nvfp4``: parameters as the checkpoint has them, then one prepared module.

A layer is prepared as soon as its last tensor is loaded, so that the whole model is never in memory unquantised.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.parameter import (
    BlockQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from torch import Tensor

from fourfold.common.quant.layers import LayerDecision, LayerPlan
from fourfold.common.quant.loading import LoadedLayer

_PARAMETERS = {
    "weight": ModelWeightParameter,
    "block": GroupQuantScaleParameter,
    "fp8_block": BlockQuantScaleParameter,
    "global": PerTensorScaleParameter,
}


class FourfoldNvfp4LinearMethod(LinearMethodBase):
    """Column, row, merged and QKV parallel and replicated layers; bias and tensor parallelism are SGLang's own."""

    def __init__(self, plan: LayerPlan, decision: LayerDecision) -> None:
        self.plan = plan
        self.decision = decision

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        group: Any = getattr(layer, "tp_group", None)
        rank, parts = get_group_rank_size(group)
        start = rank * input_size_per_partition if input_size != input_size_per_partition else 0

        def largest_over_ranks(amax: Tensor) -> Tensor:
            amax = amax.clone()
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group.device_group)
            return amax

        loaded = LoadedLayer(
            self.plan,
            self.decision,
            tuple(output_partition_sizes),
            slice(start, start + input_size_per_partition),
            params_dtype,
            largest_over_ranks if parts > 1 else None,
        )
        loaded.create(layer, _PARAMETERS, extra_weight_attrs["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.fourfold_loaded.prepare(layer)  # what no loader completed: dummy weights

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.fourfold(x, bias)

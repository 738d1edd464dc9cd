"""GPTQ error feedback (arXiv 2210.17323) onto NVFP4: block scales first, then columns rounded in order.

The rounding error of each column is spread over the columns that follow, by the inverse of the layer's Hessian. The
block scales are those of `fourfold.common.quant.scales`, chosen before, so the result is an ordinary NVFP4 tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.quant import e2m1, nvfp4
from fourfold.common.quant.nvfp4 import BLOCK, NvFp4Tensor
from fourfold.common.quant.quantizer import quantize_weight

DAMPING = 0.05  # of the mean diagonal, added to the Hessian
LAZY = 128  # columns between updates of the rest of the matrix


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    name: str,
    method: str = "sweep",
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
    damping: float = DAMPING,
) -> NvFp4Tensor:
    """Quantise one matrix with error feedback.

    Args:
        weight: ``[N, K]``.
        hessian: float32 ``[K, K]``, mean of ``x x^T`` of the layer's inputs.
        name, method, importance, global_scale: as in `quantize_weight`.
        damping: share of the mean diagonal that is added to the diagonal.

    Raises:
        FourfoldError: as `quantize_weight`, or the Hessian does not fit or is not positive definite.
    """
    start = quantize_weight(weight, name=name, method=method, importance=importance, global_scale=global_scale)
    columns = weight.shape[1]
    if tuple(hessian.shape) != (columns, columns):
        raise FourfoldError(f"{name}: expected a Hessian of {[columns, columns]}, got {list(hessian.shape)}")
    h = hessian.to(torch.float32).clone()
    diagonal = h.diagonal()
    diagonal.add_(damping * diagonal.mean().clamp(min=1e-12))
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        upper = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:
        raise FourfoldError(
            f"{name}: the Hessian is not positive definite; calibrate with more tokens or raise damping"
        ) from None
    w = weight.float().clone()
    step = start.block_scales.float() * start.global_scale
    for first in range(0, columns, LAZY):
        last = min(first + LAZY, columns)
        errors = torch.empty(w.shape[0], last - first)
        for k in range(first, last):
            column = step[:, k // BLOCK]
            error = (w[:, k] - e2m1.decode(e2m1.encode(w[:, k] / column)) * column) / upper[k, k]
            errors[:, k - first] = error
            w[:, k + 1 : last] -= error[:, None] * upper[k, k + 1 : last]
        w[:, last:] -= errors @ upper[first:last, last:]
    return NvFp4Tensor(nvfp4.encode(w, start.block_scales, start.global_scale), start.block_scales, start.global_scale)

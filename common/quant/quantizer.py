"""Quantise a weight to NVFP4: compiled on a CPU, in PyTorch elsewhere and where there is no compiler.

Both read a weight in its own dtype and hold at most `CHUNK` elements of it in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.log import get_logger
from fourfold.common.quant import nvfp4, scales
from fourfold.common.quant.native import quantize as native
from fourfold.common.quant.native.build import NativeUnavailable
from fourfold.common.quant.nvfp4 import NvFp4Tensor
from fourfold.common.settings import SCALE_METHODS

CHUNK = 1 << 24
_warned = False


def quantize_weight(
    weight: Tensor,
    *,
    name: str,
    method: str = "sweep",
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
    compiled: bool | None = None,
) -> NvFp4Tensor:
    """Quantise one matrix.

    Args:
        weight: ``[N, K]``, floating point.
        name: for messages.
        method: one of `fourfold.common.settings.SCALE_METHODS`; see `fourfold.common.quant.scales`.
        importance: mean square of each input channel ``[K]`` (any positive multiple of it), or None.
        global_scale: float32 scalar, for a weight that passed `nvfp4.check_weight`; default: check it and take
            ``amax / 2688``.
        compiled: True or False to insist on the compiled or the PyTorch quantiser.

    Raises:
        FourfoldError: NVFP4 cannot hold the weight, or ``importance`` does not fit it; the message has the name.
    """
    if method not in SCALE_METHODS:
        raise FourfoldError(f"scales {method!r} is unknown; expected one of {', '.join(SCALE_METHODS)}")
    scale = nvfp4.global_scale_of(nvfp4.check_weight(weight, name)) if global_scale is None else global_scale
    if importance is not None:
        importance = _check_importance(importance, weight, name)
    scale = scale.to(device=weight.device, dtype=torch.float32)
    if compiled is not False and weight.device.type == "cpu" and (compiled or _compiled()):
        packed, block_scales = native.quantize(weight, float(scale), method, importance)
        return NvFp4Tensor(packed, block_scales, scale)
    chunk = max(1, CHUNK // weight.shape[1])
    parts: list[tuple[Tensor, Tensor]] = []
    for part in weight.split(chunk):
        part = part.float()
        chosen = scales.choose_block_scales(part, scale, method, importance)
        parts.append((nvfp4.encode(part, chosen, scale), chosen))
    return NvFp4Tensor(torch.cat([p for p, _ in parts]), torch.cat([s for _, s in parts]), scale)


def _check_importance(importance: Tensor, weight: Tensor, name: str) -> Tensor:
    importance = importance.to(device=weight.device, dtype=torch.float32)
    if tuple(importance.shape) != (weight.shape[1],):
        raise FourfoldError(
            f"{name}: the importance statistics have shape {list(importance.shape)}, the layer has {weight.shape[1]} "
            "inputs; they belong to another model"
        )
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise FourfoldError(f"{name}: the importance statistics have negative or non-finite values; collect them again")
    top = importance.max()
    # A channel that was never active still has a weight: a thousandth of a thousandth keeps its rounding sane.
    return (importance / top).clamp(min=1e-6) if bool(top > 0) else torch.ones_like(importance)


def _compiled() -> bool:
    global _warned
    try:
        native.library()
    except NativeUnavailable as error:
        if not _warned:
            get_logger(__name__).warning("fourfold: quantising in PyTorch, about 20 times slower: %s", error)
            _warned = True
        return False
    return True

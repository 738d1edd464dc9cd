"""MLA attention of a draft: what SGLang's DeepSeek layers need beside parameters that are loaded one by one.

They multiply ``q_a_proj`` and ``kv_a_proj_with_mqa`` as one layer, and attend with ``w_kc`` and ``w_vc``, which SGLang
makes of ``kv_b_proj`` once that is loaded.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.engines import SGLANG_MLA

FUSED = {"fused_qkv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"]}
_ABSORBED = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def check(config: Any) -> None:
    """Refuse what SGLang would build with another cache than the target's.

    Raises:
        FourfoldError: the attention is sparse, or the draft directory does not say that it is MLA.
    """
    if getattr(config, "kv_lora_rank", None) is None:
        return
    if getattr(config, "index_topk", None) is not None:
        raise FourfoldError("FourfoldMTP does not build sparse MLA attention on SGLang (index_topk in config.json)")
    if SGLANG_MLA not in config.architectures:
        raise FourfoldError(
            f"config.json of the draft directory does not name {SGLANG_MLA} beside FourfoldMTP, by which SGLang tells "
            "MLA; write it again with `fourfold mtp extract --engine sglang`"
        )


class Halves:
    """Tensors that wait for the other half of a fused layer.

    Args:
        parameters: the names of the model's parameters.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = parameters
        self.waiting: dict[str, dict[str, Tensor]] = {}

    def join(self, place: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """The parameter to load and its tensor; None for the first half of a fused layer.

        Raises:
            FourfoldError: the halves have two scales where the layer has one.
        """
        for fused, halves in FUSED.items():
            for half in halves:
                start, found, end = place.rpartition(f".{half}.")
                whole = f"{start}.{fused}.{end}"
                if not found or whole not in self.parameters:
                    continue
                parts = self.waiting.setdefault(whole, {})
                parts[half] = tensor
                if len(parts) < len(halves):
                    return None
                first, second = (parts[name] for name in halves)
                del self.waiting[whole]
                if first.numel() > 1:
                    return whole, torch.cat([first, second])
                if not torch.equal(first.view(()), second.view(())):
                    raise FourfoldError(
                        f"{' and '.join(halves)} of the MTP head have different {end}, {float(first)} and "
                        f"{float(second)}; SGLang multiplies both as one layer: store them unquantised or with one"
                    )
                return whole, first
        return place, tensor


def absorb(block: nn.Module, config: Any, quant_config: Any) -> None:
    """Make ``w_kc`` and ``w_vc`` of the decoder layer ``block``; nothing where its attention is not MLA.

    Raises:
        FourfoldError: ``kv_b_proj`` is in a format that SGLang does not split.
    """
    attention = getattr(block, "self_attn", None)
    if not hasattr(attention, "w_kc"):
        return
    found = getattr(attention.kv_b_proj, "weight", None)  # type: ignore[union-attr]
    if found is None or found.dtype not in _ABSORBED:
        state = "no weight" if found is None else f"a weight of {found.dtype}"
        raise FourfoldError(
            f"kv_b_proj of the MTP head has {state}; SGLang's MLA takes it unquantised or in FP8: leave it out of the "
            "quantisation (quant.ignore: ['kv_b_proj'])"
        )
    from sglang.srt.models.deepseek_common.deepseek_weight_loader import DeepseekV2WeightLoaderMixin

    model: Any = SimpleNamespace(model=SimpleNamespace(decoder=block), config=config, quant_config=quant_config)
    DeepseekV2WeightLoaderMixin.post_load_weights(model, is_nextn=True)

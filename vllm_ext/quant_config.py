"""``fourfold_nvfp4`` as vLLM's quantisation method: which layers it takes, and the model's `LayerPlan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from fourfold.common.quant.method import claims
from fourfold.common.settings import METHOD

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from fourfold.common.quant.layers import LayerPlan


@register_quantization_config(METHOD)
class FourfoldNvfp4Config(QuantizationConfig):
    """Serves NVFP4 checkpoints of both vocabularies, and quantises other models while they load."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        self.mapper: WeightsMapper | None = None
        self._plan: LayerPlan | None = None

    @classmethod
    def get_name(cls) -> str:  # type: ignore[override]
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FourfoldNvfp4Config:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:  # type: ignore[override]
        return claims(hf_quant_cfg, user_quant)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.mapper = hf_to_vllm_mapper

    @property
    def plan(self) -> LayerPlan:
        """The plan of the model that is being built."""
        if self._plan is None:
            from vllm.config import get_current_vllm_config

            from fourfold.common.quant.plan import plan_for
            from fourfold.common.settings import additional_settings

            vllm_config = get_current_vllm_config()
            settings = additional_settings(vllm_config.additional_config).quant
            rename = self.mapper.apply_list if self.mapper is not None else None
            self._plan = plan_for(
                vllm_config.model_config.model, self.config, settings, self.packed_modules_mapping, rename
            )
        return self._plan

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from fourfold.vllm_ext.linear import FourfoldNvfp4LinearMethod

        if isinstance(layer, LinearBase):
            columns = getattr(layer, "input_size_per_partition", layer.input_size)
            decision = self.plan.decide(prefix, columns)
            return UnquantizedLinearMethod() if decision is None else FourfoldNvfp4LinearMethod(self.plan, decision)
        self.plan.check_other(prefix, type(layer).__name__)
        return None

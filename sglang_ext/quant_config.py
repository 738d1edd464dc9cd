"""``fourfold_nvfp4`` as SGLang's quantisation method: which layers it takes, and the model's `LayerPlan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from fourfold.common.quant.method import claims
from fourfold.common.settings import METHOD

if TYPE_CHECKING:
    from sglang.srt.models.utils import WeightsMapper

    from fourfold.common.quant.layers import LayerPlan


class FourfoldNvfp4Config(QuantizationConfig):
    """Serves NVFP4 checkpoints of both vocabularies, and quantises other models while they load."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        self.mapper: WeightsMapper | None = None
        self._plan: LayerPlan | None = None

    @classmethod
    def get_name(cls) -> str:
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
        return cls({key: value for key, value in config.items() if key not in ("packed_modules_mapping", "hf_config")})

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None) -> str | None:
        return claims(hf_quant_cfg, user_quant)

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: WeightsMapper) -> None:
        self.mapper = hf_to_sglang_mapper

    @property
    def plan(self) -> LayerPlan:
        """The plan of the model that is being built."""
        if self._plan is None:
            from sglang.srt.runtime_context import get_server_args

            from fourfold.common.quant.plan import plan_for
            from fourfold.common.settings import settings_from_env

            model = get_server_args().model_path
            rename = self.mapper.apply_list if self.mapper is not None else None
            self._plan = plan_for(model, self.config, settings_from_env().quant, self.packed_modules_mapping, rename)
        return self._plan

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        from fourfold.sglang_ext.linear import FourfoldNvfp4LinearMethod

        if isinstance(layer, LinearBase):
            decision = self.plan.decide(prefix, layer.input_size)
            return UnquantizedLinearMethod() if decision is None else FourfoldNvfp4LinearMethod(self.plan, decision)
        self.plan.check_other(prefix, type(layer).__name__)
        return None

    def is_linear_unquantized(self, prefix: str) -> bool:
        from fourfold.common.quant.nvfp4 import BLOCK

        return self.plan.decide(prefix, BLOCK, count=False) is None

    def get_scaled_act_names(self) -> list[str]:
        return []

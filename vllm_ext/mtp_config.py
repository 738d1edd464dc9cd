"""The config classes of draft directories (``fourfold mtp extract``), for ``transformers.AutoConfig``.

They are at module level because vLLM pickles configs to its workers.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from fourfold.common.mtp.head import KEY


class FourfoldMtpConfig(PretrainedConfig):
    """The target's text config, with the defaults of its own class, and the head under ``fourfold_mtp``."""

    model_type = "mtp"
    has_no_defaults_at_init = True

    def __init__(self, **kwargs: Any) -> None:
        data: Any = kwargs
        if kwargs.get("target_model_type") in CONFIG_MAPPING:  # else what config.json says has to do
            data = CONFIG_MAPPING[kwargs["target_model_type"]](**kwargs).to_dict()
        super().__init__(**{**data, "model_type": type(self).model_type})


class FourfoldMlaMtpConfig(FourfoldMtpConfig):
    """The same for a target with MLA attention, which vLLM tells by this model type."""

    model_type = "deepseek_mtp"

    def update(self, config_dict: dict[str, Any]) -> None:
        # vLLM gives every config of this type the architecture of its own DeepSeek head.
        super().update({k: v for k, v in config_dict.items() if k != "architectures" or not hasattr(self, KEY)})

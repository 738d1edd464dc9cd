"""Rows of `fourfold.common.compat` for MTP heads around MLA attention on SGLang."""

from __future__ import annotations

from fourfold.common.seam import Seam, sglang

_LAYER = "models.deepseek_v2:DeepseekV2AttentionMLA"
_MLA = "SGLang's MLA layers load and absorb their weights themselves"
_HANDLER = "SGLang's PyTorch attention has a handler for MLA"


MLA: tuple[Seam, ...] = (
    sglang(
        "models.deepseek_common.attention_backend_handler:AttentionBackendRegistry.register",
        "absorbed MLA attention on a CPU",
        ("backend_name", "handler_func"),
        _HANDLER,
    ),
    sglang(
        "models.deepseek_common.attention_forward_methods.forward_methods:AttnForwardMethod.MLA",
        "absorbed MLA attention on a CPU",
        until=_HANDLER,
    ),
    sglang(
        "models.deepseek_common.deepseek_weight_loader:DeepseekV2WeightLoaderMixin.post_load_weights",
        "makes the absorbed weights of a draft's MLA layer; called on what it reads of a model",
        ("is_nextn",),
        _MLA,
    ),
    sglang("platforms.interface:SRTPlatform.init_backend", "registers the handler"),
    sglang(f"{_LAYER}.w_kc", "tells a layer that has them", until=_MLA),
    sglang(f"{_LAYER}.fused_qkv_a_proj_with_mqa", "loads the two projections that it fuses", until=_MLA),
    sglang(f"{_LAYER}.kv_b_proj", "whether they can be made", until=_MLA),
    sglang(
        "models.deepseek_nextn:DeepseekV3ForCausalLMNextN",
        "named in a draft's config beside its own class, by which SGLang tells MLA",
        until="SGLang tells MLA by a draft's config",
    ),
    sglang(
        "utils.common:BumpAllocator.__init__", "what an MLA layer is called with", ("buffer_size", "dtype", "device")
    ),
)

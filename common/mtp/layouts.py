"""The known MTP families, as data: tensor names, formula, where each fact was read, and the classes that serve them.

A new family is one `Family`; a model that an engine serves with a class of its own is one line of `IN_TREE`.
Read from vLLM 0.32.0, SGLang 0.5.23 and transformers 5.19. The first draft step gets what the target's own class
returns: its hidden state after the final norm; before it for kimi_k3, and the residual streams for deepseek_v4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fourfold.common.mtp.head import Formula

# A text model's names, and those of a text model inside a multimodal one.
_MODEL = ("model.", "language_model.model.", "model.language_model.")


@dataclass(frozen=True)
class Family:
    """One way to name and compute an MTP head.

    Attributes:
        name: of the family.
        roles: role (`head.ROLES`) to name below a prefix; ``{n}`` is the module, ``{layer}`` is ``target_layers + n``.
        block: prefix of the decoder layer, in the same notation.
        prefixes: what may come before these names.
        formula: how a step computes.
        source: where names and formula were read, and where the sources disagree.
        architectures: targets whose formula was checked; they also tell families with equal names apart.
        optional: roles that a checkpoint may lack.
        limits: what the generic classes do not compute; empty where they compute all of it.
        plain_projection: the engines' own classes never quantise the projection, whatever the config says.
    """

    name: str
    roles: Mapping[str, str]
    block: str
    prefixes: tuple[str, ...]
    formula: Formula
    source: str
    architectures: tuple[str, ...] = ()
    optional: tuple[str, ...] = ("head", "embedding")
    limits: str = ""
    plain_projection: bool = True


def _triple(
    prefix: str, embedding: str = "enorm", hidden: str = "hnorm", projection: str = "eh_proj"
) -> dict[str, str]:
    return {"enorm": prefix + embedding, "hnorm": prefix + hidden, "eh_proj": prefix + projection}


_LAYER = _triple("layers.{layer}.") | {"embedding": "layers.{layer}.embed_tokens"}
_SHARED_HEAD = _LAYER | {"norm": "layers.{layer}.shared_head.norm", "head": "layers.{layer}.shared_head.head"}
_QWEN = _triple("", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc") | {"norm": "norm"}

FAMILIES: tuple[Family, ...] = (
    Family(
        "deepseek_v3",
        _SHARED_HEAD | {"vocabulary": "layers.{layer}.shared_head.vocabulary"},
        "layers.{layer}",
        _MODEL,
        Formula(mask_first_position=True),
        "vLLM deepseek_mtp.py; SGLang deepseek_nextn.py and transformers MtpModel compute the same without the mask",
        ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
        ("head", "embedding", "vocabulary"),
    ),
    Family(
        "glm4_moe",
        _SHARED_HEAD,
        "layers.{layer}",
        _MODEL,
        Formula(mask_first_position=True),
        "SGLang glm4_moe_nextn.py and transformers MtpModel, both without the mask; vLLM glm4_moe_mtp.py masks, and "
        "feeds the state before the norm back",
        ("Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"),
    ),
    Family(
        "kimi_k3",
        _SHARED_HEAD,
        "layers.{layer}",
        _MODEL,
        Formula(mask_first_position=True, feedback="pre_norm"),
        "vLLM models/kimi_k3/nvidia/mtp.py; SGLang has no class",
        ("KimiK3ForConditionalGeneration",),
        limits="its decoder layer is the target's with attention residuals turned off",
    ),
    Family(
        "bailing_moe",
        _LAYER | {"norm": "layers.{layer}.final_layernorm", "head": "layers.{layer}.shared_head.head"},
        "layers.{layer}",
        _MODEL,
        Formula(mask_first_position=True),
        "vLLM bailing_moe_mtp.py; bailing_moe_v3_mtp.py and SGLang bailing_moe_nextn.py do not mask",
        ("BailingMoeV2_5ForCausalLM", "BailingMoeV3ForCausalLM", "BailingMoeV2ForCausalLM"),
    ),
    Family(
        "transformers",
        _triple("layers.{n}.") | {"norm": "layers.{n}.post_norm"},
        "layers.{n}.mtp_block",
        ("mtp.", "model.mtp.", "model.language_model.mtp."),
        Formula(),
        "transformers modeling_layers.MtpModel and conversion_mapping['MtpModel']; its norms are the target's, so "
        "whether they multiply by 1 + weight is not in the layout",
    ),
    Family(
        "transformers_flat",
        _triple("layers.{layer}.") | {"norm": "layers.{layer}.post_norm"},
        "layers.{layer}",
        _MODEL,
        Formula(),
        "transformers conversion_mapping['MtpModel'], which nests the layer's tensors under mtp_block",
    ),
    Family(
        "qwen3_next",
        _QWEN,
        "layers.{n}",
        ("mtp.",),
        Formula(unit_offset_norm=True),
        "vLLM qwen3_next_mtp.py, qwen3_5_mtp.py; SGLang qwen3_next_mtp.py, qwen3_5_mtp.py; the mask is in neither",
        (
            *("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
            *("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        ),
        plain_projection=False,
    ),
    Family(
        "exaone_moe",
        _QWEN,
        "layers.{n}",
        ("mtp.",),
        Formula(),
        "vLLM exaone_moe_mtp.py, exaone4_5_mtp.py; SGLang exaone_moe_mtp.py",
        ("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM", "Exaone4_5_ForConditionalGeneration"),
        plain_projection=False,
    ),
    Family(
        "mimo",
        _triple("mtp_layers.{n}.", "token_layernorm", "hidden_layernorm", "input_proj")
        | {"norm": "mtp_layers.{n}.final_layernorm"},
        "mtp_layers.{n}",
        ("model.",),
        Formula(embedding_first=False, mask_first_position=True),
        "vLLM mimo_mtp.py, SGLang mimo_mtp.py",
        ("MiMoForCausalLM",),
    ),
    Family(
        "mimo_v2",
        _triple("layers.{n}.") | {"norm": "layers.{n}.final_layernorm"},
        "layers.{n}",
        ("model.mtp.",),
        Formula(),
        "vLLM mimo_v2_mtp.py (first module only), SGLang mimo_v2_nextn.py",
        ("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "MiMoV2OmniForCausalLM"),
        limits="its decoder layer has the swa_* heads and a dense MLP, which the target's class does not build",
    ),
    Family(
        "minimax_m3",
        _triple("layers.{n}.") | {"norm": "layers.{n}.final_layernorm"},
        "layers.{n}.transformer_layer",
        ("model.mtp.", "language_model.model.mtp."),
        Formula(mask_first_position=True, feedback="pre_norm", unit_offset_norm=True),
        "vLLM models/minimax_m3/nvidia/mtp.py; SGLang minimax_m3.py skips these tensors",
        ("MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3SparseForCausalLM"),
        limits="its decoder layer is sparse attention and MoE by flags of its own",
        plain_projection=False,
    ),
    Family(
        "inkling",
        _triple("layers.{n}.", "embed_norm", "hidden_norm", "input_proj") | {"norm": "chain_norm"},
        "layers.{n}.transformer_block",
        ("model.mtp.",),
        Formula(embedding_first=False, target_embedding_norm=True),
        "vLLM models/inkling/nvidia/mtp.py, SGLang inkling.py, transformers MtpModel (mtp_hidden_states_first)",
        ("InklingForConditionalGeneration", "InklingForCausalLM"),
        ("norm",),
        limits="its decoder layer has short convolutions and a dense MLP, and its logits are divided by a muP width",
    ),
    Family(
        "deepseek_v4",
        {role: "{n}." + role for role in ("enorm", "hnorm", "e_proj", "h_proj", "norm", "head")}
        | {"embedding": "{n}.emb.tok_emb"},
        "{n}",
        ("mtp.",),
        Formula(mask_first_position=True, feedback="pre_norm"),
        "vLLM models/deepseek_v4/nvidia/mtp.py; SGLang deepseek_v4_nextn.py without the mask",
        ("DeepseekV4ForCausalLM", "DeepseekV4ForConditionalGeneration"),
        limits="hc_* (hyper-connections: hc_mult residual streams, reduced by hc_head) is not computed",
        plain_projection=False,
    ),
    Family(
        "ernie4_5_moe",
        _triple("", "mtp_emb_norm.{n}", "mtp_hidden_norm.{n}", "mtp_linear_proj.{n}"),
        "mtp_block.{n}",
        ("model.",),
        Formula(mask_first_position=True, feedback="pre_norm"),
        "vLLM ernie_mtp.py, SGLang ernie4_eagle.py: the head has no norm of its own",
        ("Ernie4_5_MoeForCausalLM",),
    ),
)

# Target architecture to the class that serves its MTP: vLLM's (registry.py, SpeculativeConfig.hf_config_override) and
# SGLang's (model_config.py); empty where there is none.
IN_TREE: Mapping[str, tuple[str, str]] = {
    "DeepseekV3ForCausalLM": ("DeepSeekMTPModel", "DeepseekV3ForCausalLMNextN"),
    "DeepseekV32ForCausalLM": ("DeepseekV32MTPModel", "DeepseekV3ForCausalLMNextN"),
    "GlmMoeDsaForCausalLM": ("DeepseekV32MTPModel", "GlmMoeDsaForCausalLMNextN"),
    "DeepseekV4ForCausalLM": ("DeepSeekV4MTPModel", "DeepseekV4ForCausalLMNextN"),
    "Glm4MoeForCausalLM": ("Glm4MoeMTPModel", "Glm4MoeForCausalLMNextN"),
    "Glm4MoeLiteForCausalLM": ("Glm4MoeLiteMTPModel", "Glm4MoeLiteForCausalLMNextN"),
    "KimiK3ForConditionalGeneration": ("KimiK3MTPModel", ""),
    "BailingMoeV2ForCausalLM": ("", "BailingMoeForCausalLMNextN"),
    "BailingMoeV2_5ForCausalLM": ("BailingMoeV25MTPModel", "BailingMoeForCausalLMNextN"),
    "BailingMoeV3ForCausalLM": ("BailingMoeV3MTPModel", "BailingMoeForCausalLMNextN"),
    "Qwen3NextForCausalLM": ("Qwen3NextMTP", "Qwen3NextForCausalLMMTP"),
    "Qwen3_5ForCausalLM": ("Qwen3_5MTP", "Qwen3_5ForCausalLMMTP"),
    "Qwen3_5MoeForCausalLM": ("Qwen3_5MoeMTP", "Qwen3_5ForCausalLMMTP"),
    "Qwen3_5ForConditionalGeneration": ("Qwen3_5MTP", "Qwen3_5ForCausalLMMTP"),
    "Qwen3_5MoeForConditionalGeneration": ("Qwen3_5MoeMTP", "Qwen3_5ForCausalLMMTP"),
    "ExaoneMoEForCausalLM": ("ExaoneMoeMTP", "ExaoneMoEForCausalLMMTP"),
    "ExaoneMoeForCausalLM": ("ExaoneMoeMTP", "ExaoneMoEForCausalLMMTP"),
    "Exaone4_5_ForConditionalGeneration": ("Exaone4_5_MTP", ""),
    "MiMoForCausalLM": ("MiMoMTPModel", "MiMoMTP"),
    "MiMoV2ForCausalLM": ("MiMoV2MTPModel", "MiMoV2MTP"),
    "MiMoV2FlashForCausalLM": ("MiMoV2MTPModel", "MiMoV2MTP"),
    "MiniMaxM3SparseForConditionalGeneration": ("MiniMaxM3MTP", ""),
    "InklingForConditionalGeneration": ("InklingMTPModel", "InklingForConditionalGenerationMTP"),
    "Ernie4_5_MoeForCausalLM": ("ErnieMTPModel", "Ernie4_5_MoeForCausalLMMTP"),
    # Layouts that are not in `FAMILIES`.
    "HYV3ForCausalLM": ("HYV3MTPModel", "HYV3ForCausalLMNextN"),
    "LongcatFlashForCausalLM": ("LongCatFlashMTPModel", "LongcatFlashForCausalLMNextN"),
    "NemotronHForCausalLM": ("NemotronHMTPModel", "NemotronHForCausalLMMTP"),
    "PanguUltraMoEForCausalLM": ("OpenPanguMTPModel", ""),
    "Qwen4ExpForConditionalGeneration": ("Qwen4ExpMTP", "Qwen4ExpForCausalLMMTP"),
    "Step3p5ForCausalLM": ("Step3p5MTP", "Step3p5MTP"),
}

"""How checkpoints of an architecture name their tensors: what transformers' class and its conversions do not say.

A family is one `Layout`. Sizes are those of `stated`, or products of them in brackets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fourfold.common.recipe.rehearsing.deepseek_v41 import finished
from fourfold.common.recipe.rehearsing.formats import DENSE, Shapes
from fourfold.common.recipe.rehearsing.kimi_k3 import KIMI_K3
from fourfold.common.recipe.rehearsing.kimi_k3 import SOURCE as KIMI_K3_SOURCE
from fourfold.common.recipe.rehearsing.stated import Named, Stated, norms


@dataclass(frozen=True)
class Layout:
    """How a checkpoint differs from transformers' own names.

    Attributes:
        model_type: transformers' class; empty: it has none, and all tensors are ``stated``.
        source: where it was read.
        mtp: prefix of an MTP module, ``{n}`` its number and ``{layer}`` that of the layer after the model's; empty: the
            checkpoint has none, whatever its config says.
        head: tensors of an MTP module beside its decoder layer, which is one of the model's.
        strip: prefix that the checkpoint has not.
        whole: ``model_type`` is the class of the whole multimodal model, of which the config is the text model's part.
        scale: suffix in place of ``weight`` for the scale of a block format.
        block: prefix of an MTP module's decoder layer; default: ``mtp``.
        dspark: in place of ``head`` where the config names DSpark: of the first stage, and of the last.
        single: parts of names of tensors in float32, beside those that transformers' class keeps so.
        repaired: parts of names that the conversions run backwards get wrong, and what the checkpoint has.
        unlike: what transformers' class is told in place of keys that it does not read as the model does, for every
            layer where the config has a list; ``finish``: adds what these keys mean.
    """

    model_type: str
    source: str
    mtp: str = ""
    head: Named = field(default_factory=dict)
    strip: str = ""
    whole: bool = False
    scale: str = "weight_scale_inv"
    block: str = ""
    dspark: tuple[Named, Named] = ({}, {})
    single: tuple[str, ...] = ()
    repaired: tuple[tuple[str, str], ...] = ()
    unlike: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Mapping[str, Any], Shapes], Shapes] | None = None
    stated: tuple[Stated, ...] = ()


_TABLE = (("vocab_size", "hidden_size"), "bfloat16")
_TWICE = ("hidden_size", (2, "hidden_size"))
_HC: Named = {
    "hc_head_fn": (("hc_mult", ("hc_mult", "hidden_size")), "float32"),
    "hc_head_base": (("hc_mult",), "float32"),
    "hc_head_scale": ((1,), "float32"),
}


def _dspark(first: str, second: str, more: Named) -> tuple[Named, Named]:
    """Of two or more stages; the Markov head's factors have other names in other checkpoints."""
    ranked = (("vocab_size", "dspark_markov_rank"), "bfloat16")
    return (
        {"main_proj.weight": (("hidden_size", "dspark_target_layer_ids * hidden_size"), DENSE), **norms("main_norm")},
        {
            **norms("norm"),
            f"markov_head.{first}.weight": ranked,
            f"markov_head.{second}.weight": ranked,
            "confidence_head.proj.weight": ((1, "hidden_size + dspark_markov_rank"), "float32"),
            **more,
        },
    )


_V4: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "mtp": "mtp.{n}.",
    "strip": "model.",
    "scale": "scale",
    "repaired": ((".attn.norm.", ".attn.kv_norm."),),  # two names become kv_norm
}
_DEEPSEEK: Named = {
    "eh_proj.weight": (_TWICE, "bfloat16"),
    **norms("enorm", "hnorm", "shared_head.norm"),
    "embed_tokens.weight": _TABLE,
    "shared_head.head.weight": _TABLE,
}
LAYOUTS: dict[str, Layout] = {
    "DeepseekV4ForCausalLM": Layout(
        **_V4,
        source="transformers deepseek_v4 and its conversions; mtp.*: load_weights of vLLM's DeepSeekV4MTP and SGLang's "
        "DeepseekV4ForCausalLMNextN, DSpark: of both engines' DSpark classes",
        head={
            "e_proj.weight": (("hidden_size", "hidden_size"), DENSE),
            "h_proj.weight": (("hidden_size", "hidden_size"), DENSE),
            **norms("enorm", "hnorm", "norm"),
            **_HC,
        },
        dspark=_dspark("markov_w1", "markov_w2", _HC),
    ),
    "DeepseekV41ForCausalLM": Layout(
        **_V4,
        source="transformers deepseek_v4 for what V4 has; the rest: both engines' classes of V4.1 and their loaders",
        head={},
        dspark=_dspark("embed", "head", {}),
        unlike={"compress_ratios": 0, "num_hash_layers": 0},
        finish=finished,
    ),
    "DeepseekV32ForCausalLM": Layout(
        "deepseek_v32",
        "transformers deepseek_v32 and its conversions; the MTP layer: fourfold's table of layouts (deepseek_v3)",
        "model.layers.{layer}.",
        _DEEPSEEK,
    ),
    "GlmMoeDsaForCausalLM": Layout(
        "glm_moe_dsa",
        "transformers glm_moe_dsa and its conversions; the MTP layer: fourfold's table of layouts (deepseek_v3)",
        "model.layers.{layer}.",
        _DEEPSEEK,
    ),
    "Qwen3_5MoeForCausalLM": Layout(
        "qwen3_5_moe_text",
        "transformers qwen3_5_moe and its conversions; mtp.*: fourfold's table of layouts (qwen3_next)",
        "mtp.",
        {"fc.weight": (_TWICE, DENSE), **norms("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")},
        block="mtp.layers.{n}.",
    ),
    "Qwen3_5MoeForConditionalGeneration": Layout(
        "qwen3_5_moe",
        "transformers qwen3_5_moe and its conversions; mtp.*: fourfold's table of layouts (qwen3_next), and vLLM's "
        "qwen3_5_mtp of mtp.fc, which is BF16 in NVFP4 checkpoints though none of them says so; experts apart: those "
        "of the 397B, am17an/llama.cpp#4",
        "mtp.",
        {"fc.weight": (_TWICE, "bfloat16"), **norms("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")},
        block="mtp.layers.{n}.",
        whole=True,
    ),
    "NemotronHForCausalLM": Layout(
        "nemotron_h",
        "transformers nemotron_h and its conversions; mtp.*: load_weights of vLLM's NemotronHMTP",
        "mtp.",
        {
            "layers.0.eh_proj.weight": (_TWICE, "bfloat16"),
            **norms("layers.0.enorm", "layers.0.hnorm", "layers.1.final_layernorm"),
        },
        block="mtp.layers.{n}.",
    ),
    "KimiK3ForConditionalGeneration": Layout("", KIMI_K3_SOURCE, stated=KIMI_K3),
    "MiniMaxM3SparseForConditionalGeneration": Layout(
        "minimax_m3_vl",
        "transformers minimax_m3_vl and its conversions; scales of MXFP8: load_weights of vLLM's MiniMaxM3Model",
        whole=True,
        repaired=(
            *((f".block_sparse_moe.{one}_proj.", f".mlp.{one}_proj.") for one in ("gate", "up", "down")),
            (".block_sparse_moe.fc", ".mlp.fc"),
        ),
        single=("block_sparse_moe.gate.", "e_score_correction_bias", "patch_embedding"),
    ),
}

"""Kimi K3's published tensors: layers of linear and of latent attention, experts on a latent state, its vision tower.

Names, sizes and dtypes are those that both engines' classes read: ``A_log`` has an entry for each channel of a head, of
which the first, as many as there are heads, count; experts are in MXFP4, all else in BF16 or, where the tag says so, in
float32.
"""

from __future__ import annotations

from collections.abc import Iterable

from fourfold.common.recipe.rehearsing.formats import EXPERT
from fourfold.common.recipe.rehearsing.stated import Config, Named, Stated, every_layer, linear, norms

SOURCE = "load_weights of vLLM's and SGLang's KimiK3ForConditionalGeneration; sizes add up to the published ones"
_H, _SINGLE = "hidden_size", "float32"
_CHANNELS, _HEADS = "linear_attn_config.head_dim", "linear_attn_config.num_heads"
_KDA = f"{_HEADS} * {_CHANNELS}"
_NOPE, _VALUES = "num_attention_heads * qk_nope_head_dim", "num_attention_heads * v_head_dim"
_LATENT, _WIDE = "routed_expert_hidden_size", "num_shared_experts * moe_intermediate_size"
_VISION, _QKV = "vision_config.vt_hidden_size", "vision_config.qkv_hidden_size"
_MERGED = f"4 * {_VISION}"  # 2 x 2 patches


def _dense(config: Config) -> Iterable[int]:
    return range(config["first_k_dense_replace"])


def _sparse(config: Config) -> Iterable[int]:
    return range(config["first_k_dense_replace"], config["num_hidden_layers"])


def _linear(config: Config) -> Iterable[int]:
    return [number - 1 for number in config["linear_attn_config"]["kda_layers"]]


def _full(config: Config) -> Iterable[int]:
    return [number - 1 for number in config["linear_attn_config"]["full_attn_layers"]]


def _blocks(config: Config) -> Iterable[int]:
    return range(config["vision_config"]["vt_num_hidden_layers"])


_CONV: Named = {
    f"{one}_conv1d.weight": ((_KDA, 1, "linear_attn_config.short_conv_kernel_size"), _SINGLE) for one in "qkv"
}
_MODEL, _LAYER = "language_model.model.", "language_model.model.layers.{n}."
KIMI_K3 = (
    Stated("language_model.", linear(("lm_head", "vocab_size", _H))),
    Stated(
        _MODEL,
        {
            **linear(("embed_tokens", "vocab_size", _H), ("output_attn_res_proj", 1, _H)),
            **norms("norm", "output_attn_res_norm"),
        },
    ),
    Stated(
        _LAYER,
        {
            **norms("input_layernorm", "post_attention_layernorm", "self_attention_res_norm", "mlp_res_norm"),
            **linear(("self_attention_res_proj", 1, _H), ("mlp_res_proj", 1, _H)),
        },
        every_layer,
    ),
    Stated(
        _LAYER + "self_attn.",
        {
            **linear(*((f"{one}_proj", _KDA, _H) for one in "qkvg"), ("o_proj", _H, _KDA), ("b_proj", _HEADS, _H)),
            **linear(("f_a_proj", _CHANNELS, _H), ("f_b_proj", _KDA, _CHANNELS)),
            **_CONV,
            "o_norm.weight": ((_CHANNELS,), _SINGLE),
            "A_log": ((_CHANNELS,), _SINGLE),
            "dt_bias": ((_KDA,), _SINGLE),
        },
        _linear,
    ),
    Stated(
        _LAYER + "self_attn.",
        {
            **linear(
                ("q_a_proj", "q_lora_rank", _H),
                ("q_b_proj", f"{_NOPE} + num_attention_heads * qk_rope_head_dim", "q_lora_rank"),
                ("kv_a_proj_with_mqa", "kv_lora_rank + qk_rope_head_dim", _H),
                ("kv_b_proj", f"{_NOPE} + {_VALUES}", "kv_lora_rank"),
                ("g_proj", _VALUES, _H),
                ("o_proj", _H, _VALUES),
            ),
            **norms("q_a_layernorm", width="q_lora_rank"),
            **norms("kv_a_layernorm", width="kv_lora_rank"),
        },
        _full,
    ),
    Stated(
        _LAYER + "mlp.",
        linear(
            *((f"{one}_proj", "intermediate_size", _H) for one in ("gate", "up")),
            ("down_proj", _H, "intermediate_size"),
        ),
        _dense,
    ),
    Stated(
        _LAYER + "block_sparse_moe.",
        {
            **linear(("gate", "num_experts", _H)),
            "gate.e_score_correction_bias": (("num_experts",), _SINGLE),
            **linear(("routed_expert_down_proj", _LATENT, _H), ("routed_expert_up_proj", _H, _LATENT)),
            **norms("routed_expert_norm", width=_LATENT),
            **linear(*((f"shared_experts.{one}_proj", _WIDE, _H) for one in ("gate", "up"))),
            **linear(("shared_experts.down_proj", _H, _WIDE)),
        },
        _sparse,
    ),
    Stated(
        _LAYER + "block_sparse_moe.experts.{e}.",
        linear(
            ("w1", "moe_intermediate_size", _LATENT),
            ("w2", _LATENT, "moe_intermediate_size"),
            ("w3", "moe_intermediate_size", _LATENT),
            tag=EXPERT,
        ),
        _sparse,
    ),
    Stated(
        "vision_tower.",
        {
            "patch_embed.proj.weight": ((_VISION, 3, *("vision_config.patch_size",) * 2), "bfloat16"),
            "patch_embed.pos_emb.weight": (
                ("vision_config.init_pos_emb_height", "vision_config.init_pos_emb_width", _VISION),
                "bfloat16",
            ),
            **norms("encoder.final_layernorm", width=_VISION),
        },
    ),
    Stated(
        "vision_tower.encoder.blocks.{n}.",
        {
            **linear(("wqkv", f"3 * {_QKV}", _VISION), ("wo", _VISION, _QKV)),
            **linear(("mlp.fc0", "vision_config.vt_intermediate_size", _VISION)),
            **linear(("mlp.fc1", _VISION, "vision_config.vt_intermediate_size")),
            **norms("norm0", "norm1", width=_VISION),
        },
        _blocks,
    ),
    Stated(
        "mm_projector.",
        {**linear(("proj.0", _MERGED, _MERGED), ("proj.2", _H, _MERGED)), **norms("post_norm")},
    ),
)

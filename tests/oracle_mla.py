"""The oracle with DeepSeek-V3's decoder layers: MLA attention, and routed experts beside a shared one.

The attention of `block` needs both of MLA's scores. The rotary part likes the position 1.6 before best, so two before
better than one; the rest of a head likes tokens of odd distance on the cycle. Only together they find the token before.
Half of the tokens need the shared expert, the others one of the routed experts each, the last of which is chosen by the
router's correction bias alone.
"""

from __future__ import annotations

from typing import Any

import torch
from oracle import ATTENTION_HEADS, HEAD_DIM, LAYERS, NORM, ORDER, ROPE_THETA, SIZE, Architecture
from torch import Tensor

EXPERTS = 4
SCALING = (2 * HEAD_DIM) ** -0.5  # of scores, by the size of a head's query
SHARPNESS = 24.0  # of the scores' exponents

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "q_lora_rank": SIZE,
    "kv_lora_rank": SIZE,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "moe_intermediate_size": SIZE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "first_k_dense_replace": LAYERS - 1,
    "attention_bias": False,
    # SGLang's rotary embedding for CPUs takes no other type; with factor 1 it is the plain one.
    "rope_scaling": {
        "type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def layer(prefix: str) -> dict[str, Tensor]:
    """A layer with a dense MLP that adds nothing to the residual stream."""
    generator = torch.Generator().manual_seed(len(prefix))

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, SIZE, generator=generator) / NORM

    heads, zeros = 2 * HEAD_DIM * ATTENTION_HEADS, torch.zeros(SIZE, SIZE)
    tensors = _attention(prefix, noise(heads), noise(SIZE + HEAD_DIM), noise(heads), zeros)
    return tensors | _mlp(f"{prefix}.mlp", zeros)


def block(prefix: str, out: Tensor, down: Tensor) -> dict[str, Tensor]:
    """`oracle._block` of this architecture."""
    parity = torch.tensor([(-1.0) ** ORDER.index(token) for token in range(SIZE)])
    near = (SHARPNESS / SCALING / HEAD_DIM) ** 0.5 / NORM  # of each number of the part without positions
    turned = (SHARPNESS / SCALING) ** 0.5 / NORM  # of each pair of the rotary part
    angles = 1.6 * ROPE_THETA ** (-torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    query = torch.stack([angles.cos(), -angles.sin()], 1).flatten()  # DeepSeek's pairs lie side by side
    key = torch.tensor([1.0, 0.0]).repeat(HEAD_DIM // 2)
    everywhere = torch.ones(SIZE)
    queries, keys_values = [], []
    for values in torch.eye(SIZE).split(HEAD_DIM):
        queries += [near * torch.ones(HEAD_DIM).outer(-parity), turned * query.outer(everywhere)]
        keys_values += [near * torch.ones(HEAD_DIM).outer(parity), values]
    latent = torch.cat([torch.eye(SIZE), turned * key.outer(everywhere)])
    tensors = _attention(prefix, torch.cat(queries), latent, torch.cat(keys_values), out)

    token = torch.arange(SIZE)
    routed = token >= SIZE // 2
    tensors |= _mlp(f"{prefix}.mlp.shared_experts", down * ~routed)
    router = torch.zeros(EXPERTS, SIZE)
    for expert in range(EXPERTS):
        own = token % EXPERTS == expert
        router[expert] = own.float() * (expert < EXPERTS - 1)
        tensors |= _mlp(f"{prefix}.mlp.experts.{expert}", down * (routed & own))
    bias = torch.tensor([0.0] * (EXPERTS - 1) + [0.625])
    return tensors | {f"{prefix}.mlp.gate.weight": router, f"{prefix}.mlp.gate.e_score_correction_bias": bias}


def _attention(prefix: str, queries: Tensor, latent: Tensor, keys_values: Tensor, out: Tensor) -> dict[str, Tensor]:
    """The norms and the attention of a layer: its ``q_b``, ``kv_a``, ``kv_b`` and ``o`` projections."""
    projections = {"q_a_proj": torch.eye(SIZE), "q_b_proj": queries, "kv_a_proj_with_mqa": latent}
    projections |= {"kv_b_proj": keys_values, "o_proj": out}
    tensors = {f"{prefix}.self_attn.{name}.weight": weight for name, weight in projections.items()}
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")
    return tensors | {f"{prefix}.{name}.weight": torch.ones(SIZE) for name in norms}


def _mlp(prefix: str, down: Tensor) -> dict[str, Tensor]:
    weights = {"gate": torch.eye(SIZE) / 2, "up": torch.eye(SIZE), "down": down}
    return {f"{prefix}.{name}_proj.weight": weight.clone() for name, weight in weights.items()}


DEEPSEEK = Architecture(CONFIG, layer, block, attends=True)

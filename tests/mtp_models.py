"""Tiny random models with an MTP head, in the published layouts of the families that vLLM runs on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

HIDDEN, VOCABULARY, LAYERS = 128, 256, 2
SHARED: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": LAYERS + 1,  # the last becomes the head's
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"num_key_value_heads": 2, "head_dim": 32, "use_qk_norm": True},
    # The sizes that vLLM's MLA kernel for CPUs takes.
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
}


def write_random(path: Path, model_type: str) -> Path:
    """Write a model of `MODELS` with one MTP module to the new directory ``path``."""
    from safetensors.torch import load_file, save_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**SHARED, **MODELS[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, weight.shape[-1] ** -0.5)
        else:
            weight.data.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    head = f"model.layers.{LAYERS}"
    for role in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{head}.{role}.weight"] = (torch.rand(HIDDEN) + 0.5).to(torch.bfloat16)
    tensors[f"{head}.eh_proj.weight"] = (torch.randn(HIDDEN, 2 * HIDDEN) / 16).to(torch.bfloat16)
    for copy, original in (("shared_head.head", "lm_head"), ("embed_tokens", "model.embed_tokens")):
        tensors[f"{head}.{copy}.weight"] = tensors[f"{original}.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    for key, value in written.items():
        if isinstance(value, list) and len(value) == LAYERS + 1:
            written[key] = value[:LAYERS]
    written |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    if model_type == "deepseek_v3":
        written |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    (path / "config.json").write_text(json.dumps(written))
    return path

"""Models that nobody has seen, and what `fourfold recipe new` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fourfold.common.recipe.dayzero.compose import Composed, compose, name_of
from fourfold.common.recipe.dayzero.source import read_model
from fourfold.common.recipe.loading import Catalogue

SHIPPED = Catalogue()
DENSE = {
    "architectures": ["UnseenForCausalLM"],
    "model_type": "unseen",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
MTP_LAYER = [
    f"model.layers.32.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "self_attn.q_proj", "mlp.up_proj")
]
MTP_LAYER += ["model.layers.32.shared_head.norm.weight", "model.layers.32.input_layernorm.weight"]


def model_at(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


def index_of(names: list[str], size: int) -> dict[str, Any]:
    return {
        "model__safetensors__index__json": {
            "metadata": {"total_size": size},
            "weight_map": {name: "model-00001-of-00001.safetensors" for name in names},
        }
    }


def compose_at(path: Path, hardware: str = "gb300-nvl72", workload: str = "chat", **more: Any) -> Composed:
    found = read_model(path)
    return compose(found, SHIPPED.hardware(hardware), workload, name_of(found, None), **more)


def args_of(composed: Composed, engine: str) -> dict[str, Any]:
    return composed.recipe["engines"][engine]["args"]

"""What a DeepSeek V4.1 checkpoint holds beside the tensors of V4's layers: `published`'s table of it.

Read from vLLM 0.32's classes of deepseek_v41 and their loaders, and from those of SGLang 0.5.23; transformers has none.
V4.1 shares compressed keys between layers, so compressors and indexers are in some layers only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fourfold.common.recipe.rehearsing.formats import DENSE, ROWS, Shapes

DRAFT = re.compile(r"mtp\.\d+\.ffn\.(experts\.(\d+)\.|gate\.(?:weight|bias)$)")


def finished(config: Mapping[str, Any], shapes: Shapes) -> Shapes:
    """The whole checkpoint, from ``shapes`` of V4's layers with a window alone, and its heads.

    Args:
        config: the whole config, small.
    """
    text = config["text_config"]
    hidden, routed = text["hidden_size"], text["dspark_n_routed_experts"]
    out: Shapes = {}
    for name, (shape, tag) in shapes.items():
        draft = DRAFT.match(name)
        if name.startswith("hc_head") or draft and draft[2] and int(draft[2]) >= routed:
            continue
        out[name] = ((routed, *shape[1:]) if draft and draft[2] is None else shape, tag)
        if name.endswith(".ffn.gate.bias"):  # of tokens of images
            out[f"{name}_vl"] = out[name]
    for layer in range(text["num_hidden_layers"]):
        out |= _attention(text, layer, f"layers.{layer}.attn.")
    columns = (text["engram_max_ngram_size"] - 1) * text["engram_n_heads"] * text["engram_head_dim"]
    for layer, rows in zip(text["engram_layer_ids"], text["engram_num_embeddings"], strict=True):
        engram = f"layers.{layer}.engram."
        out[f"{engram}embed.weight"] = ((rows, text["engram_head_dim"]), ROWS)
        out[f"{engram}wkv.weight"] = ((hidden * (text["hc_mult"] + 1), columns), DENSE)
        out |= {f"{engram}{name}_weight": ((text["hc_mult"], hidden), "bfloat16") for name in "qk"}
    return out | _vision(config["vision_config"], hidden)


def engram_rows(text: Mapping[str, Any]) -> list[int]:
    """Rows of each layer's table: its heads have the next prime number of them, in order, none of them twice.

    With the published config these are the published ``engram_num_embeddings``.
    """
    seen: set[int] = set()
    out = []
    for _ in text["engram_layer_ids"]:
        rows = 0
        for _ in range(text["engram_max_ngram_size"] - 1):
            size = text["engram_vocab_size"]
            for _ in range(text["engram_n_heads"]):
                while size in seen or any(size % divisor == 0 for divisor in range(2, math.isqrt(size) + 1)):
                    size += 1
                seen.add(size)
                rows += size
        out.append(rows)
    return out


def _attention(text: Mapping[str, Any], layer: int, prefix: str) -> Shapes:
    hidden, head, small = text["hidden_size"], text["head_dim"], text["index_head_dim"]
    out: Shapes = {}
    owns = layer in text["kv_source_layer_ids"]
    if owns:
        out[f"{prefix}compressor.wkv.weight"] = ((head, hidden), "bfloat16")
        out[f"{prefix}compressor.norm.weight"] = ((head,), "float32")
        if text["compress_ratios"][layer] > 1:
            out[f"{prefix}compressor.wgate.weight"] = ((head, hidden), "bfloat16")
    if layer in text["index_source_layer_ids"]:
        out[f"{prefix}indexer.wq_b.weight"] = ((text["index_n_heads"] * small, text["q_lora_rank"]), DENSE)
        out[f"{prefix}indexer.weights_proj.weight"] = ((text["index_n_heads"], hidden), "bfloat16")
        if owns:
            out[f"{prefix}indexer.wk.weight"] = ((small, head), "bfloat16")
            out[f"{prefix}indexer.k_norm.weight"] = ((small,), "float32")
    return out


def _vision(vision: Mapping[str, Any], hidden: int) -> Shapes:
    """The tower, in BF16."""
    wide, inner = vision["hidden_size"], vision["intermediate_size"]
    merged = wide * vision["downsample_ratio"] ** 2
    sizes: dict[str, tuple[int, ...]] = {
        "vision.patch_embed.proj.weight": (wide, 3 * vision["patch_size"] ** 2),
        "vision.patch_embed.proj.bias": (wide,),
        "vision.norm.weight": (wide,),
        "aligner.w1.weight": (hidden, merged),
        "aligner.w1.bias": (hidden,),
        "aligner.w2.weight": (hidden, hidden),
        "aligner.w2.bias": (hidden,),
        **{f"image_{name}": (hidden,) for name in ("start", "end", "newline")},
    }
    for block in range(vision["num_hidden_layers"]):
        prefix = f"vision.blocks.{block}."
        sizes |= {
            f"{prefix}norm1.weight": (wide,),
            f"{prefix}norm2.weight": (wide,),
            f"{prefix}attn.wqkv.weight": (3 * wide, wide),
            f"{prefix}attn.wqkv.bias": (3 * wide,),
            f"{prefix}attn.wo.weight": (wide, wide),
            f"{prefix}attn.wo.bias": (wide,),
            f"{prefix}mlp.w1.weight": (2 * inner, wide),
            f"{prefix}mlp.w2.weight": (wide, inner),
        }
    return {name: (shape, "bfloat16") for name, shape in sizes.items()}

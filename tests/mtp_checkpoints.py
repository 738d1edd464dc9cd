"""Checkpoints with an MTP head of any family, as headers over files of zeros (tests only)."""

from __future__ import annotations

import json
import math
import struct
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fourfold.common.mtp.layouts import FAMILIES, Family

HIDDEN, LAYERS, VOCABULARY, INNER = 64, 2, 256, 128
Tensors = dict[str, tuple[str, tuple[int, ...]]]
BY_NAME = {family.name: family for family in FAMILIES}
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}

VECTORS = ("input_layernorm", "post_attention_layernorm")
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate": (2, HIDDEN),
    **{f"mlp.experts.{e}.{p}_proj": (INNER, HIDDEN) for e in (0, 1) for p in ("gate", "up")},
    **{f"mlp.experts.{e}.down_proj": (HIDDEN, INNER) for e in (0, 1)},
}


def layer(name: str, shape: tuple[int, int], format: str = "bf16") -> Tensors:
    """The tensors of one linear layer in a format."""
    rows, columns = shape
    blocks = (-(-rows // 128), -(-columns // 128))
    packed = ("U8", (rows, columns // 2))
    parts: Tensors = {
        "bf16": {"weight": ("BF16", shape)},
        "fp16": {"weight": ("F16", shape)},
        "fp32": {"weight": ("F32", shape)},
        "fp8_block": {"weight": ("F8_E4M3", shape), "weight_scale_inv": ("F32", blocks)},
        "fp8_tensor": {"weight": ("F8_E4M3", shape), "weight_scale": ("F32", ()), "input_scale": ("F32", ())},
        "fp8_channel": {"weight": ("F8_E4M3", shape), "weight_scale": ("F32", (rows, 1))},
        "mxfp8": {"weight": ("F8_E4M3", shape), "weight_scale_inv": ("U8", (rows, columns // 32))},
        "mxfp4": {"weight": packed, "weight_scale": ("U8", (rows, columns // 32))},
        "nvfp4_modelopt": {
            "weight": packed,
            "weight_scale": ("F8_E4M3", (rows, columns // 16)),
            "weight_scale_2": ("F32", ()),
            "input_scale": ("F32", ()),
        },
        "nvfp4_compressed": {
            "weight_packed": packed,
            "weight_scale": ("F8_E4M3", (rows, columns // 16)),
            "weight_global_scale": ("F32", (1,)),
        },
    }[format]
    return {f"{name}.{part}": place for part, place in parts.items()}


FORMATS = (
    *("bf16", "fp16", "fp32", "fp8_block", "fp8_tensor", "fp8_channel", "mxfp8", "mxfp4"),
    *("nvfp4_modelopt", "nvfp4_compressed"),
)


def decoder(prefix: str, format: str = "bf16") -> Tensors:
    """The tensors of one decoder layer; its router keeps BF16."""
    tensors: Tensors = {f"{prefix}.{name}.weight": ("BF16", (HIDDEN,)) for name in VECTORS}
    for name, shape in MATRICES.items():
        tensors |= layer(f"{prefix}.{name}", shape, "bf16" if name == "mlp.gate" else format)
    return tensors


def head(family: Family, prefix: str, modules: int = 1, format: str = "bf16", without: Iterable[str] = ()) -> Tensors:
    """The tensors of an MTP head of ``family``; its projections keep BF16."""
    tensors: Tensors = {}
    shapes = {"eh_proj": (HIDDEN, 2 * HIDDEN), "e_proj": (HIDDEN, HIDDEN), "h_proj": (HIDDEN, HIDDEN)}
    shapes |= {"head": (VOCABULARY, HIDDEN), "embedding": (VOCABULARY, HIDDEN)}
    for n in range(modules):
        tensors |= decoder(prefix + family.block.format(n=n, layer=LAYERS + n), format)
        for role, template in family.roles.items():
            if role not in without:
                name = prefix + template.format(n=n, layer=LAYERS + n)
                vector = ("I32", (VOCABULARY // 2,)) if role == "vocabulary" else ("BF16", (HIDDEN,))
                tensors |= layer(name, shapes[role]) if role in shapes else {f"{name}.weight": vector}
    return tensors


def target(format: str = "bf16") -> Tensors:
    """The tensors of a target of `LAYERS` decoder layers."""
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (VOCABULARY, HIDDEN))}
    tensors |= {"model.norm.weight": ("BF16", (HIDDEN,)), "lm_head.weight": ("BF16", (VOCABULARY, HIDDEN))}
    for i in range(LAYERS):
        tensors |= decoder(f"model.layers.{i}", format)
    return tensors


def architecture(family: Family) -> str:
    """A target of the family."""
    return family.architectures[0] if family.architectures else "SomeForCausalLM"


def write_file(path: Path, tensors: Tensors, scale: int = 1) -> None:
    """Write a safetensors file of zeros without writing the zeros; int32 tensors count."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES.get(dtype, 1) * scale
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for entry in header.values():
            if entry["dtype"] == "I32" and scale == 1:
                file.seek(8 + len(text) + entry["data_offsets"][0])
                file.write(array("i", range(math.prod(entry["shape"]))).tobytes())


def write_model(path: Path, tensors: Tensors, config: dict[str, Any], shards: int = 1) -> Path:
    """Write a model directory: one file, or shards with an index in the order of ``tensors``."""
    path.mkdir(parents=True)
    base = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "vocab_size": VOCABULARY, "model_type": "some"}
    (path / "config.json").write_text(json.dumps(base | config))
    if shards == 1:
        write_file(path / "model.safetensors", tensors)
        return path
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        own = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        weight_map |= dict.fromkeys(own, file)
        write_file(path / file, {name: tensors[name] for name in own})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def model(path: Path, family: str, shards: int = 1, **config: Any) -> Path:
    """A whole model of ``family`` in BF16 at ``path``."""
    found = BY_NAME[family]
    tensors = target() | head(found, found.prefixes[0])
    return write_model(path, tensors, {"architectures": [architecture(found)], **config}, shards)

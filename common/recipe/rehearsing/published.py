"""A small checkpoint in the published layout of a model's own architecture: names, dtypes, formats, kinds of layers.

Names and shapes come from transformers' class of the architecture and the conversions by which it reads the published
checkpoint, run backwards; those of MTP and DSpark heads, which transformers skips, from the table here. The layers are
the first of each kind that the config names. Numbers are random; the files are what an engine's loader sees.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.rehearsing.traits import EXPERTS, MTP, PER_TOKEN

if TYPE_CHECKING:
    from torch import Tensor

# The most of each size; what a kernel or a layer is written for (head_dim, ranks of keys, windows) stays.
MOST: dict[str, int] = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_attention_heads": 64,
    "q_lora_rank": 256,
    "o_lora_rank": 128,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    **dict.fromkeys(EXPERTS, 16),
    **dict.fromkeys(PER_TOKEN, 8),
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "dspark_noise_token_id")
UP_TO = ("num_hash_layers", "first_k_dense_replace")  # layers below this number are of a kind of their own
# Tags of a tensor's format, as the dtype that it has until it is written.
DENSE, EXPERT = "float8_e4m3fn", "int8"
Shapes = dict[str, tuple[tuple[int, ...], str]]  # name to shape and tag


@dataclass(frozen=True)
class Layout:
    """How a checkpoint differs from transformers' own names.

    Attributes:
        model_type: transformers' class.
        strip: prefix that the checkpoint has not.
        scale: suffix in place of ``weight`` for the scale of a block format.
        mtp: prefix of an MTP module, ``{n}`` its number; its decoder layer is one of the model's.
        head: further tensors of an MTP module: name to sizes (keys of the config, or numbers) and tag.
        dspark: the same where the config names DSpark: of the first stage, and of the last.
        source: where it was read.
        repaired: parts of names that the conversions run backwards get wrong, and what the checkpoint has.
    """

    model_type: str
    strip: str
    scale: str
    mtp: str
    head: Mapping[str, tuple[tuple[Any, ...], str]]
    source: str
    dspark: tuple[Mapping[str, tuple[tuple[Any, ...], str]], ...] = field(default=({}, {}))
    repaired: tuple[tuple[str, str], ...] = ()


_HC = {
    "hc_head_fn": (("hc_mult", ("hc_mult", "hidden_size")), "float32"),
    "hc_head_base": (("hc_mult",), "float32"),
    "hc_head_scale": ((1,), "float32"),
}
_NORM = (("hidden_size",), "bfloat16")
LAYOUTS: dict[str, Layout] = {
    "DeepseekV4ForCausalLM": Layout(
        "deepseek_v4",
        "model.",
        "scale",
        "mtp.{n}.",
        {
            "e_proj.weight": (("hidden_size", "hidden_size"), DENSE),
            "h_proj.weight": (("hidden_size", "hidden_size"), DENSE),
            **{f"{name}.weight": _NORM for name in ("enorm", "hnorm", "norm")},
            **_HC,
        },
        "transformers deepseek_v4 and its conversions; mtp.*: load_weights of vLLM's DeepSeekV4MTP and SGLang's "
        "DeepseekV4ForCausalLMNextN, DSpark: of both engines' DSpark classes",
        (
            {
                "main_proj.weight": (("hidden_size", ("dspark_targets", "hidden_size")), DENSE),
                "main_norm.weight": _NORM,
            },
            {
                "norm.weight": _NORM,
                **_HC,
                "markov_head.markov_w1.weight": (("vocab_size", "dspark_markov_rank"), "bfloat16"),
                "markov_head.markov_w2.weight": (("vocab_size", "dspark_markov_rank"), "bfloat16"),
                "confidence_head.proj.weight": ((1, "confidence"), "float32"),
            },
        ),
        ((".attn.norm.", ".attn.kv_norm."),),  # of two names that become kv_norm
    ),
}


@dataclass(frozen=True)
class Published:
    """A checkpoint that was written.

    Attributes:
        layers: number of each layer in the model that it stands for.
        tensors: how many.
        draft: ``mtp``, ``dspark`` or None: the head in it.
        source: of the names.
    """

    path: Path
    architecture: str
    layers: tuple[int, ...]
    tensors: int
    draft: str | None
    source: str


def known(config: Mapping[str, Any]) -> bool:
    """Whether there is a layout of the config's architecture."""
    return _architecture(config) in LAYOUTS


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or ["unknown"])[0])


def write_published(path: Path, config: Mapping[str, Any]) -> Published:
    """Write a small checkpoint of the config's own architecture into the new directory ``path``.

    Raises:
        FourfoldError: no layout of the architecture is known, or this transformers has no class of it.
    """
    from safetensors.torch import save_file

    architecture = _architecture(config)
    layout = LAYOUTS.get(architecture)
    if layout is None:
        raise FourfoldError(f"architecture {architecture}: no published layout is known; known: {', '.join(LAYOUTS)}")
    small, layers = shrunken(config)
    draft = _draft(small)
    tensors = dict(_written(_shapes(layout, small, draft), layout, small))
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(small, indent=1))
    return Published(path, architecture, layers, len(tensors), draft, layout.source)


def shrunken(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The config with small sizes and one layer of each kind, and which layers these are."""
    total = int(config["num_hidden_layers"])
    per_layer = [key for key, value in config.items() if isinstance(value, list) and 0 <= len(value) - total <= 4]
    kinds: dict[tuple[Any, ...], int] = {}
    for layer in range(total):
        kind = (*(config[key][layer] for key in per_layer), *(layer < (config.get(key) or 0) for key in UP_TO))
        kinds.setdefault(kind, layer)
    kept = tuple(kinds.values())
    small = {key: min(value, MOST[key]) if key in MOST and value else value for key, value in config.items()}
    small["num_hidden_layers"] = len(kept)
    for key in per_layer:
        small[key] = [config[key][layer] for layer in kept] + config[key][total:]
    for key in UP_TO:
        if config.get(key):
            small[key] = sum(layer < config[key] for layer in kept)
    for key in TOKENS:
        if isinstance(config.get(key), int):
            small[key] = min(config[key], small["vocab_size"] - 1)
    if config.get("dspark_target_layer_ids"):
        small["dspark_target_layer_ids"] = list(range(len(kept)))[-len(config["dspark_target_layer_ids"]) :]
    return small, kept


def _draft(config: Mapping[str, Any]) -> str | None:
    if config.get("dspark_target_layer_ids"):
        return "dspark"
    return "mtp" if any(config.get(key) for key in MTP) else None


def _shapes(layout: Layout, config: Mapping[str, Any], draft: str | None) -> Shapes:
    """Published names of the whole checkpoint."""
    stages = len(config["dspark_target_layer_ids"]) if draft == "dspark" else 0
    modules = stages or int(next((config[key] for key in MTP if config.get(key)), 0))
    layers, out = int(config["num_hidden_layers"]), Shapes()
    for name, spec in _model_shapes(layout, config, layers + modules).items():
        for wrong, right in layout.repaired:
            name = name.replace(wrong, right)
        parts = name.split(".")
        number = int(parts[1]) if parts[0] == "layers" else -1
        if number >= layers:  # a decoder layer more, which an MTP module has
            name = layout.mtp.format(n=number - layers) + ".".join(parts[2:])
        out[name] = spec
    for module in range(modules):
        if not stages:
            more: dict[str, Any] = dict(layout.head)
        else:
            first, last = layout.dspark
            more = {**(first if module == 0 else {}), **(last if module == stages - 1 else {})}
        for name, (sizes, tag) in more.items():
            out[layout.mtp.format(n=module) + name] = (tuple(_size(size, config) for size in sizes), tag)
    return out


def _size(size: Any, config: Mapping[str, Any]) -> int:
    if isinstance(size, int):
        return size
    if isinstance(size, tuple):
        return math.prod(_size(part, config) for part in size)
    if size == "dspark_targets":
        return len(config["dspark_target_layer_ids"])
    if size == "confidence":
        return config["hidden_size"] + config["dspark_markov_rank"]
    return int(config[size])


def _model_shapes(layout: Layout, config: Mapping[str, Any], layers: int) -> Shapes:
    """What transformers' class of the model has, by its published names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    given = {key: value for key, value in config.items() if key not in ("quantization_config", "architectures")}
    for key, value in given.items():
        if isinstance(value, list) and config["num_hidden_layers"] <= len(value) < layers and "layer_ids" not in key:
            given[key] = value + value[-1:] * (layers - len(value))
    kind = given.pop("model_type")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(kind, **(given | {"num_hidden_layers": layers}))
            )
    except (KeyError, ValueError) as error:
        raise FourfoldError(f"transformers builds no {kind}: {error}; its published names are not known") from error
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    plain = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()), "lm_head"]
    single = model._keep_in_fp32_modules_strict or ()
    tagged: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in linear and not any(part in name for part in plain):
            dtype = torch.float8_e4m3fn
        elif tensor.dim() == 3 and ".experts." in name:
            dtype = torch.int8
        elif not tensor.dtype.is_floating_point:
            dtype = tensor.dtype
        else:
            dtype = torch.float32 if any(part in name for part in single) else torch.bfloat16
        tagged[name.removeprefix(layout.strip)] = torch.empty(tensor.shape, dtype=dtype, device="meta")
    published = revert_weight_conversion(model, tagged)
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in published.items()}


def _written(shapes: Shapes, layout: Layout, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Random tensors in the config's formats."""
    import torch

    generator = torch.Generator().manual_seed(0)
    quantised = config.get("quantization_config") or {}
    block = quantised.get("weight_block_size")
    algorithm = str(quantised.get("moe_quant_algo") or config.get("expert_dtype") or "").lower()

    def codes(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(0, 112, (rows, columns), dtype=torch.uint8, generator=generator).view(dtype)

    for name, (shape, tag) in shapes.items():
        stem = name.removesuffix("weight")
        nvfp4 = algorithm == "nvfp4" and not name.startswith("mtp.")
        if tag == EXPERT and nvfp4:
            rows, columns = shape
            yield name, codes(rows, columns // 2, torch.uint8)
            yield stem + "weight_scale", torch.full((rows, columns // 16), 0.5).to(torch.float8_e4m3fn)
            yield stem + "weight_scale_2", torch.tensor(2.0**-6)
            yield stem + "input_scale", torch.tensor(2.0**-6)
        elif tag == EXPERT and algorithm in ("fp4", "nvfp4"):
            rows, columns = shape
            yield name, codes(rows, columns // 2, torch.int8)
            yield stem + layout.scale, torch.full((rows, columns // 32), 2.0**-6).to(torch.float8_e8m0fnu)
        elif tag in (DENSE, EXPERT) and block:
            rows, columns = shape
            yield name, codes(rows, columns, torch.float8_e4m3fn)
            scales = torch.full((math.ceil(rows / block[0]), math.ceil(columns / block[1])), 2.0**-8)
            micro = quantised.get("scale_fmt") == "ue8m0" and algorithm != "fp8"
            yield stem + layout.scale, scales.to(torch.float8_e8m0fnu) if micro else scales
        elif tag.startswith(("int", "uint")) and tag != EXPERT:
            most = next((config[key] for key in EXPERTS if config.get(key)), 1)
            yield name, torch.randint(0, most, shape, generator=generator).to(getattr(torch, tag))
        else:
            dtype = torch.bfloat16 if tag in (DENSE, EXPERT) else getattr(torch, tag)
            values = torch.randn(shape, generator=generator) * 0.02 + (1.0 if "norm" in name else 0.0)
            yield name, values.to(dtype)

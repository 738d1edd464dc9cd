"""A small checkpoint in the published layout of a model's own architecture: names, dtypes, formats, kinds of layers.

Names and shapes come from transformers' class of the architecture and the conversions by which it reads the published
checkpoint, run backwards; what transformers does not say, MTP and DSpark heads above all, from `layouts`, all of it
where it has no class. The layers are the first of each kind that the config names. Numbers are random; the files are
what an engine's loader sees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.rehearsing.deepseek_v41 import engram_rows
from fourfold.common.recipe.rehearsing.formats import Shapes, written
from fourfold.common.recipe.rehearsing.layouts import LAYOUTS, Layout
from fourfold.common.recipe.rehearsing.replica import write_tokenizer
from fourfold.common.recipe.rehearsing.stated import shapes_of, size
from fourfold.common.recipe.rehearsing.traits import EXPERTS, MTP, PER_TOKEN

if TYPE_CHECKING:
    from torch import Tensor

# The most of each size; what a kernel or a layer is written for (head_dim, ranks of keys, windows) stays.
MOST: dict[str, int] = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "dense_intermediate_size": 512,
    "shared_intermediate_size": 512,
    "projector_hidden_size": 512,
    "routed_expert_hidden_size": 256,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
    "moe_latent_size": 256,
    "mamba_num_heads": 32,
    "num_heads": 16,  # of linear attention
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 256,
    "o_lora_rank": 128,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "dspark_n_routed_experts": 8,
    "engram_vocab_size": 64,
    "engram_compressed_vocab_size": 246,  # what engines make of the tokenizer
    **dict.fromkeys(EXPERTS, 16),
    **dict.fromkeys(PER_TOKEN, 8),
}
MOST_VISION: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("hidden_size", "intermediate_size"), 256),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "projection_dim"), MOST["hidden_size"]),
}
MOST_VISION |= {f"vt_{key}": most for key, most in MOST_VISION.items()} | {
    "qkv_hidden_size": 256,
    "mm_hidden_size": 256,
}
NOT_ASKED = ("quantization_config", "architectures")  # of transformers' class
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "dspark_noise_token_id")
ONE = ("candidate_source_layer_id",)  # a layer of a kind of its own
UP_TO = ("num_hash_layers", "first_k_dense_replace")  # layers below this number are of a kind of their own
LAYER = re.compile(r"(?:model\.(?:language_model\.)?|backbone\.)?layers\.(\d+)\.(.*)")
ONE_BASED = ("kda_layers", "full_attn_layers")  # numbers of layers that count from 1
KINDS = "layers_block_type"  # of every layer; of those of an MTP module with the prefix ``mtp_``


@dataclass(frozen=True)
class Published:
    """A checkpoint that was written.

    Attributes:
        layers: number of each layer in the model that it stands for.
        tensors: how many.
        draft: ``mtp``, ``dspark``, ``eagle3`` or None: the head in it, or the draft model beside it.
        source: of the names.
        draft_path: of the draft model's own checkpoint.
    """

    path: Path
    architecture: str
    layers: tuple[int, ...]
    tensors: int
    draft: str | None
    source: str
    draft_path: Path | None = None


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
    architecture = _architecture(config)
    layout = LAYOUTS.get(architecture)
    if layout is None:
        raise FourfoldError(f"architecture {architecture}: no published layout is known; known: {', '.join(LAYOUTS)}")
    small, layers = shrunken(config)
    text = small.get("text_config", small)
    draft = _draft(text) if layout.mtp else None
    shapes = _shapes(layout, text, draft, {} if text is small else small)
    if layout.finish is not None:
        shapes = layout.finish(small, shapes)
    count = save(path, shapes, small, text, layout.scale)
    return Published(path, architecture, layers, count, draft, layout.source)


def save(path: Path, shapes: Shapes, config: Mapping[str, Any], text: Mapping[str, Any], scale: str) -> int:
    """Write tensors, config and a tokenizer of ``text``'s vocabulary; how many tensors."""
    from safetensors.torch import save_file

    tensors = dict(written(shapes, scale, {**config, **text}))
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(path, text["vocab_size"])
    return len(tensors)


def shrunken(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The config with small sizes and one layer of each kind, and which layers these are."""
    if "text_config" in config:
        text, kept = shrunken(config["text_config"])
        outer = {key: _least(key, value, MOST) for key, value in config.items()} | {"text_config": text}
        if "vision_config" in config:
            vision = config["vision_config"]
            outer["vision_config"] = {key: _least(key, value, MOST_VISION) for key, value in vision.items()}
        _renumber(outer, kept, _layers(config["text_config"]))
        return outer, kept
    total = _layers(config)
    said = [*_said(config, total)]
    kinds: dict[tuple[Any, ...], int] = {}
    for layer in range(total):
        below = (layer < (config.get(key) or 0) for key in UP_TO)
        one = (layer == config.get(key) for key in ONE)
        kinds.setdefault((*(of(layer) for of in said), *below, *one), layer)
    kept = tuple(kinds.values())
    small: dict[str, Any] = _narrowed(config, kept, total) | {"num_hidden_layers": len(kept)}
    small |= {key: kept.index(config[key]) for key in ONE if config.get(key) in kept}
    small |= {key: sum(layer < config[key] for layer in kept) for key in UP_TO if config.get(key)}
    for key in TOKENS:
        if isinstance(config.get(key), int):
            small[key] = min(config[key], small["vocab_size"] - 1)
    if config.get("dspark_target_layer_ids"):
        small["dspark_target_layer_ids"] = list(range(len(kept)))[-len(config["dspark_target_layer_ids"]) :]
    if "indexer_types" in config:  # engines compute which layers share an indexer, unless they are told
        small["index_topk_pattern"] = "".join("S" if kind == "shared" else "F" for kind in small["indexer_types"])
    if "full_attention_interval" in config:
        small["full_attention_interval"] = len(kept)  # the last kind that the list of layers has is full attention
    _renumber(small, kept, total)
    if config.get("engram_layer_ids"):
        small["engram_num_embeddings"] = engram_rows(small)
    return small, kept


def _said(config: Mapping[str, Any], total: int) -> Iterator[Callable[[int], Any]]:
    """What lists of the config, and of its parts, say of a layer."""
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "quantization_config":
            yield from _said(value, total)
        elif (first := _first(key)) is not None:
            yield lambda layer, those=value, first=first: layer + first in those
        elif _by_layer(value, total):
            yield value.__getitem__


def _narrowed(config: Mapping[str, Any], kept: tuple[int, ...], total: int) -> dict[str, Any]:
    """The config, and its parts, with small sizes and those layers alone."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "quantization_config":
            out[key] = _narrowed(value, kept, total)
        elif (first := _first(key)) is not None:
            out[key] = [kept.index(number - first) + first for number in value if number - first in kept]
        elif _by_layer(value, total):
            out[key] = [value[layer] for layer in kept] + value[total:]
        else:
            out[key] = _least(key, value, MOST)
    return out


def _first(key: str) -> int | None:
    """The first layer's number in a list of layers of this name; None: it is the name of no such list."""
    if key in ONE_BASED:
        return 1
    return 0 if key.endswith("_layer_ids") and key != "dspark_target_layer_ids" else None


def _by_layer(value: Any, total: int) -> bool:
    """Whether it is a list of an entry for each layer, and some for MTP modules."""
    return isinstance(value, list) and 0 <= len(value) - total <= 4


def _least(key: str, value: Any, most: Mapping[str, int]) -> Any:
    return min(value, most[key]) if key in most and isinstance(value, int) else value


def _layers(config: Mapping[str, Any]) -> int:
    return int(config.get("num_hidden_layers") or len(config[KINDS]))


def _renumber(config: dict[str, Any], kept: tuple[int, ...], total: int) -> None:
    """Have what the config says of quantisation name the layers that are left."""
    quantised = dict(config.get("quantization_config") or {})
    if "ignore" in quantised:
        patterns = (_renumbered(pattern, kept, total) for pattern in quantised["ignore"])
        quantised["ignore"] = [pattern for pattern in patterns if pattern]
    if "quantized_layers" in quantised:
        named = ((_renumbered(name, kept, total), how) for name, how in quantised["quantized_layers"].items())
        quantised["quantized_layers"] = {name: how for name, how in named if name}
    if quantised:
        config["quantization_config"] = quantised


def _renumbered(pattern: str, kept: tuple[int, ...], total: int) -> str | None:
    """A pattern of module names for the layers that are left; None: its layer is not."""
    match = re.search(r"layers\.(\d+)", pattern)
    if match is None or pattern.startswith("mtp."):  # which counts its own
        return pattern
    layer = int(match[1])
    if layer < total and layer not in kept:
        return None
    number = kept.index(layer) if layer < total else layer - total + len(kept)
    return pattern[: match.start(1)] + str(number) + pattern[match.end(1) :]


def _draft(config: Mapping[str, Any]) -> str | None:
    if config.get("dspark_target_layer_ids"):
        return "dspark"
    return "mtp" if any(config.get(key) for key in MTP) else None


def _shapes(layout: Layout, config: Mapping[str, Any], draft: str | None, outer: Mapping[str, Any]) -> Shapes:
    """Published names of the whole checkpoint; ``outer``: the config that this one of the text model is in."""
    if layout.stated:
        return shapes_of(layout.stated, {**outer, **config})
    stages = len(config["dspark_target_layer_ids"]) if draft == "dspark" else 0
    modules = stages or (int(next(config[key] for key in MTP if config.get(key))) if draft else 0)
    layers, out = int(config["num_hidden_layers"]), Shapes()
    more_layers = modules * len(config.get(f"mtp_{KINDS}") or [1])
    for name, spec in _model_shapes(layout, config, layers + more_layers, outer).items():
        for wrong, right in layout.repaired:
            name = name.replace(wrong, right)
        match = LAYER.fullmatch(name)
        if match is not None and int(match[1]) >= layers:  # a decoder layer more, which an MTP module has
            name = _module(layout.block or layout.mtp, int(match[1]) - layers, layers) + match[2]
        out[name] = spec
    for module in range(modules):
        if not stages:
            more: dict[str, Any] = dict(layout.head)
        else:
            first, last = layout.dspark
            more = {**(first if module == 0 else {}), **(last if module == stages - 1 else {})}
        for name, (sizes, tag) in more.items():
            out[_module(layout.mtp, module, layers) + name] = (tuple(size(one, config) for one in sizes), tag)
    return out


def _module(prefix: str, number: int, layers: int) -> str:
    return prefix.format(n=number, layer=layers + number)


def _model_shapes(layout: Layout, config: Mapping[str, Any], layers: int, outer: Mapping[str, Any]) -> Shapes:
    """What transformers' class of the model has, by its published names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    given = {key: value for key, value in config.items() if key not in NOT_ASKED}
    for key, value in given.items():
        if isinstance(value, list) and config["num_hidden_layers"] <= len(value) < layers and "layer_ids" not in key:
            given[key] = value + (config.get(f"mtp_{key}") or value[-1:] * (layers - len(value)))
    for key, value in layout.unlike.items():
        given[key] = [value] * layers if isinstance(given.get(key), list) else value
    kind, given["num_hidden_layers"] = layout.model_type, layers
    auto = AutoModelForCausalLM
    if layout.whole:
        given, auto = {**outer, "text_config": given}, AutoModelForImageTextToText
    given = {key: deepcopy(value) for key, value in given.items() if key not in ("model_type", *NOT_ASKED)}  # it writes
    try:
        with torch.device("meta"):
            model = auto.from_config(AutoConfig.for_model(kind, **given))
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
    return {
        name: (tuple(t.shape), "float32" if any(one in name for one in layout.single) else str(t.dtype).split(".")[1])
        for name, t in published.items()
    }

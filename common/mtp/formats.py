"""In which format each linear layer of a head is stored, from dtypes, shapes and names of its tensors.

What a checkpoint's ``quantization_config`` declares is read apart from that, so that contradictions can be reported.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.layer_names import matches
from fourfold.common.tensor_index import FP8, Entry

PLAIN = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
NVFP4 = ("nvfp4_modelopt", "nvfp4_compressed")
_CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8")
_SCALES = frozenset(("F32", "BF16", "F16"))
_EXPONENTS = frozenset(("F8_E8M0", "U8"))
# Tensors beside the weight that do not decide its format.
_ASIDE = {"bias", "input_scale", "input_global_scale", "weight_shape", "k_scale", "v_scale", "q_scale"}
WEIGHTS = ("weight", "weight_packed")
_PARAMETERS = _ASIDE | {*WEIGHTS, "scale"}
_PARAMETERS |= {"weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Stored:
    """How a layer is stored: a format and the shape of its weight once it is unpacked, output features before input."""

    format: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Rule:
    """A format: names and dtypes of weight and scale, values in an element, shapes of the scale, global scale."""

    format: str
    weight: str
    dtypes: frozenset[str]
    packed: int
    scales: tuple[str, ...]
    scale_dtypes: frozenset[str]
    shapes: Callable[[int, int, tuple[int, int]], Iterable[tuple[int, ...]]]
    global_scale: str | None = None


_F8, _BYTES, _PAIR = frozenset((FP8,)), frozenset(("U8", "I8")), ("weight_scale", "weight_scale_inv", "scale")
_RULES = (
    _Rule("fp8_tensor", "weight", _F8, 1, _PAIR[:1], _SCALES, lambda n, k, b: ((), (1,), (1, 1))),
    _Rule("fp8_channel", "weight", _F8, 1, _PAIR[:1], _SCALES, lambda n, k, b: ((n,), (n, 1))),
    _Rule(
        *("fp8_block", "weight", _F8, 1, _PAIR, _SCALES | {"F8_E8M0"}),
        lambda n, k, b: ((-(-n // b[0]), -(-k // b[1])),),
    ),
    _Rule("mxfp8", "weight", _F8, 1, _PAIR, _EXPONENTS, lambda n, k, b: ((n, -(-k // 32)),)),
    _Rule("nvfp4_modelopt", "weight", _BYTES, 2, _PAIR[:1], _F8, lambda n, k, b: ((n, k // 16),), "weight_scale_2"),
    _Rule(
        *("nvfp4_compressed", "weight_packed", _BYTES, 2, _PAIR[:1], _F8),
        lambda n, k, b: ((n, k // 16),),
        "weight_global_scale",
    ),
    *(_Rule("mxfp4", weight, _BYTES, 2, _PAIR, _EXPONENTS, lambda n, k, b: ((n, -(-k // 32)),)) for weight in WEIGHTS),
)


def split(name: str) -> tuple[str, str]:
    """Layer and parameter of a tensor name; a tensor that is no known parameter is a layer of its own."""
    layer, _, parameter = name.rpartition(".")
    return (layer, parameter) if layer and parameter in _PARAMETERS else (name, "weight")


def without_expert(layer: str) -> str:
    """The name of a layer with ``*`` for the number of its expert."""
    return _EXPERT.sub("*", layer)


def stored_layers(tensors: Mapping[str, Entry], block: tuple[int, int] = (128, 128)) -> dict[str, Stored]:
    """The layers with a matrix among ``tensors``, each with its format.

    Args:
        tensors: tensor name to entry.
        block: rows and columns of an FP8 block scale.

    Raises:
        FourfoldError: the tensors of a layer are no known format, or a vector is stored in 8 bits.
    """
    layers: dict[str, dict[str, Entry]] = defaultdict(dict)
    for name, entry in tensors.items():
        layer, parameter = split(name)
        layers[layer][parameter] = entry
    found: dict[str, Stored] = {}
    for layer, parts in layers.items():
        weight = parts.get("weight") or parts.get("weight_packed")
        if weight is None and set(parts) <= _ASIDE:
            continue
        if weight is not None and len(weight.shape) < 2 and not set(parts) - _ASIDE - {"weight"}:
            if weight.dtype in _CODES:
                raise FourfoldError(f"{layer}: a vector in {weight.dtype}; expected floating point")
            continue
        found[layer] = _stored(layer, parts, weight, block)
    return found


def _stored(layer: str, parts: Mapping[str, Entry], weight: Entry | None, block: tuple[int, int]) -> Stored:
    deciding = {name: entry for name, entry in parts.items() if name not in _ASIDE}
    if weight is not None and len(weight.shape) >= 2 and 0 not in weight.shape:
        if len(deciding) == 1 and "weight" in parts and weight.dtype in PLAIN:
            return Stored(PLAIN[weight.dtype], weight.shape)
        *experts, rows, columns = weight.shape
        for rule in _RULES:
            scale = next((deciding[name] for name in rule.scales if name in deciding), None)
            shared = deciding.get(rule.global_scale or "")
            count = 2 + (rule.global_scale is not None)
            if scale is None or len(deciding) != count or (rule.global_scale and shared is None):
                continue
            if rule.weight not in deciding or weight.dtype not in rule.dtypes or scale.dtype not in rule.scale_dtypes:
                continue
            shapes = [(*experts, *shape) for shape in rule.shapes(rows, columns * rule.packed, block)]
            if scale.shape not in shapes:
                continue
            if shared is not None and (shared.dtype != "F32" or math.prod(shared.shape) != math.prod(experts)):
                continue
            return Stored(rule.format, (*experts, rows, columns * rule.packed))
    raise FourfoldError(f"{layer}: its tensors are no format that is known: {_listed(parts)}")


def _listed(parts: Mapping[str, Entry]) -> str:
    return ", ".join(f"{name} {entry.dtype} {list(entry.shape)}" for name, entry in sorted(parts.items()))


@dataclass(frozen=True)
class Declared:
    """What a ``quantization_config`` says.

    Attributes:
        groups: (layer patterns, format) in order; the pattern ``Linear`` means every layer.
        ignore: layers that keep the model's dtype.
        subtree: whether a pattern also means a run of components (`layer_names.matches`).
        block: rows and columns of an FP8 block.
        unread: the method, where it is not one that is read here.
    """

    groups: tuple[tuple[tuple[str, ...], str], ...] = ()
    ignore: tuple[str, ...] = ()
    subtree: bool = True
    block: tuple[int, int] = (128, 128)
    unread: str = ""

    def format_of(self, layer: str) -> str | None:
        """The format that ``layer`` should have; None for the model's dtype."""
        if any(matches(layer, pattern, self.subtree) for pattern in self.ignore):
            return None
        for targets, format in self.groups:
            if any(t == "Linear" or matches(layer, t, self.subtree) for t in targets):
                return format
        return None


_MODELOPT = {"NVFP4": NVFP4[0], "W4A16_NVFP4": NVFP4[0], "NVFP4_AWQ": NVFP4[0], "FP8": "fp8_tensor", "MXFP8": "mxfp8"}
_MODELOPT |= {"FP8_PB_WO": "fp8_block", "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel"}
_COMPRESSED = {(4, "tensor_group"): NVFP4[1], (4, "group"): "mxfp4", (8, "group"): "mxfp8"}
_COMPRESSED |= {(8, "block"): "fp8_block", (8, "channel"): "fp8_channel", (8, "tensor"): "fp8_tensor"}


def read_declared(config: Any) -> Declared:
    """Read a ``quantization_config``; a method that is not known is returned as `Declared.unread`.

    Raises:
        FourfoldError: a part is not of the type that every method writes; names it.
    """
    if config is None:
        return Declared()
    _expect(config, dict, "quantization_config")
    inner = config.get("quantization") if "quant_algo" not in config else config
    if inner is not None:
        _expect(inner, dict, "quantization_config.quantization")
        if "quant_algo" in inner:
            return _read_modelopt(inner)
    method = str(config.get("quant_method") or "").lower().replace("_", "-")
    if config.get("config_groups") is not None:
        return _read_groups(config)
    if method == "fp8":
        size = config.get("weight_block_size")
        ignore = _names(config, "modules_to_not_convert", "ignored_layers")
        if size is None:
            return Declared(((("Linear",), "fp8_tensor"),), ignore)
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
            raise FourfoldError(f"quantization_config.weight_block_size: expected two numbers, got {size!r}")
        return Declared(((("Linear",), "fp8_block"),), ignore, block=(size[0], size[1]))
    if method == "mxfp4":
        return Declared(((("Linear",), "mxfp4"),), _names(config, "modules_to_not_convert"))
    if method == "fourfold-nvfp4":
        return Declared()
    return Declared(unread=method or "none")


def _read_modelopt(config: Mapping[str, Any]) -> Declared:
    algorithm = str(config["quant_algo"]).upper()
    ignore = _names(config, "exclude_modules", "ignore")
    if algorithm == "MIXED_PRECISION":
        layers = _expect(config.get("quantized_layers", {}), dict, "quantization_config.quantized_layers")
        groups = []
        for name, layer in layers.items():
            layer = _expect(layer, dict, f"quantization_config.quantized_layers.{name}")
            groups.append(((name,), _MODELOPT.get(str(layer.get("quant_algo")).upper(), "unread")))
        return Declared(tuple(groups), ignore, subtree=False)
    if algorithm not in _MODELOPT:
        return Declared(unread=f"modelopt {algorithm}")
    return Declared(((("Linear",), _MODELOPT[algorithm]),), ignore)


def _read_groups(config: Mapping[str, Any]) -> Declared:
    groups = []
    for name, group in _expect(config["config_groups"], dict, "quantization_config.config_groups").items():
        where = f"quantization_config.config_groups.{name}"
        weights = _expect(_expect(group, dict, where).get("weights") or {}, dict, f"{where}.weights")
        format = _COMPRESSED.get((weights.get("num_bits"), weights.get("strategy")), "unread")
        if weights.get("type") != "float":
            format = "unread"
        groups.append((_names(group, "targets") or ("Linear",), format))
    return Declared(tuple(groups), _names(config, "ignore"), subtree=False)


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise FourfoldError(f"{where}: expected {'an object' if kind is dict else kind.__name__}, got {value!r}")
    return value


def _names(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    for key in keys:
        value = config.get(key)
        if value is not None:
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise FourfoldError(f"quantization_config.{key}: expected a list of layer names, got {value!r}")
            return tuple(value)
    return ()


def contradictions(stored: Mapping[str, Stored], declared: Declared) -> list[str]:
    """Where the tensors are not what the checkpoint declares, one line a kind.

    Args:
        stored: layers under the names that the checkpoint gives them, embedding and output head left out: engines
            decide about these two apart.
    """
    if declared.unread:
        quantised = sorted({s.format for s in stored.values()} - set(PLAIN.values()))
        state = f"the tensors are {', '.join(quantised)}" if quantised else "the tensors are not quantised"
        return [f"quantization_config of method {declared.unread} is not read; {state}"]
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for layer, found in stored.items():
        expected = declared.format_of(layer)
        plain = found.format in PLAIN.values()
        if expected == "unread" or (expected is None and plain):
            continue
        if plain and layer.rpartition(".")[2] in _ROUTERS:
            continue
        if expected == found.format or {expected, found.format} <= set(NVFP4):
            continue
        kinds[found.format, expected or "the model's dtype"].append(layer)
    return [
        f"{len(layers)} layer{'s are' if len(layers) > 1 else ' is'} stored as {found}, but quantization_config "
        f"declares {expected}: {', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''}"
        for (found, expected), layers in kinds.items()
    ]

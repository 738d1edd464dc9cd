"""What a checkpoint's quantisation config declares, as an engine needs it to create and load its layers.

Reads both vocabularies of NVFP4 (ModelOpt's ``quant_algo``, flat or under ``quantization``; compressed-tensors'
``config_groups``), DeepSeek's FP8 block scales, and a plain model (no config). ``quant_method: fourfold_nvfp4`` beside
the keys of either vocabulary means that vocabulary; alone it asks for quantisation while loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.layer_names import matches
from fourfold.common.quant.backends.base import Scheme
from fourfold.common.quant.nvfp4 import BLOCK
from fourfold.common.settings import METHOD


class Layout(str, Enum):
    """How the checkpoint stores the weights of its linear layers."""

    PLAIN = "plain"  # weight, floating point
    FP8_BLOCK = "fp8_block"  # weight float8_e4m3fn, weight_scale_inv float32 per block, multiplied
    COMPRESSED_TENSORS = "compressed-tensors"  # weight_packed, weight_scale, weight_global_scale (divides)
    MODELOPT = "modelopt"  # weight uint8, weight_scale, weight_scale_2 (multiplies)


# Tensors of an NVFP4 layer: codes, block scales, global scale of the weight, global scale of the activations.
NVFP4_KEYS = {
    Layout.COMPRESSED_TENSORS: ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    Layout.MODELOPT: ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}


@dataclass(frozen=True)
class Group:
    """Layers of an NVFP4 checkpoint that share a scheme; ``targets`` as compressed-tensors writes them."""

    targets: tuple[str, ...]
    scheme: Scheme


@dataclass(frozen=True)
class Source:
    """The declaration of one checkpoint.

    Attributes:
        layout: how the weights are stored.
        groups: for NVFP4 layouts, what is quantised and how; the first group that matches a layer holds.
        ignore: layers stored in the model's dtype: names, ``re:`` patterns, or globs.
        block: for FP8, rows and columns of a scaled block.
    """

    layout: Layout
    groups: tuple[Group, ...] = ()
    ignore: tuple[str, ...] = ()
    block: tuple[int, int] | None = None

    @property
    def is_nvfp4(self) -> bool:
        """Whether the weights are NVFP4 already."""
        return self.layout in (Layout.COMPRESSED_TENSORS, Layout.MODELOPT)

    def ignores(self, name: str) -> bool:
        """Whether the checkpoint stores the layer ``name`` in the model's dtype."""
        subtree = self.layout is not Layout.COMPRESSED_TENSORS
        return any(matches(name, pattern, subtree) for pattern in self.ignore)

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme that an NVFP4 checkpoint declares for the layer ``name``; None where it is not quantised."""
        if self.ignores(name):
            return None
        for group in self.groups:
            if any(target == "Linear" or matches(name, target, subtree=False) for target in group.targets):
                return group.scheme
        return None


def read_source(config: Mapping[str, Any] | None) -> Source:
    """Read a model's ``quantization_config``.

    Raises:
        FourfoldError: names the method, format or algorithm that is not served, and those that are.
    """
    if not config:
        return Source(Layout.PLAIN)
    method = str(config.get("quant_method", "")).lower().replace("_", "-")
    if config.get("config_groups") and not _is_modelopt(config):
        return _read_compressed_tensors(config)
    if _is_modelopt(config):
        return _read_modelopt(config)
    if method == "fp8":
        return _read_fp8(config)
    if method == METHOD.replace("_", "-"):
        return Source(Layout.PLAIN, ignore=_names(config, "ignore"))
    raise FourfoldError(
        f"{METHOD} cannot read a checkpoint of quant_method {config.get('quant_method')!r}; it takes models in "
        "bfloat16, float16 or float32, FP8 with block scales, and NVFP4 by ModelOpt or compressed-tensors. "
        "Serve this one without --quantization, or quantise its unquantised original"
    )


def _is_modelopt(config: Mapping[str, Any]) -> bool:
    return "quant_algo" in config or "quant_algo" in (config.get("quantization") or {})


def _names(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise FourfoldError(f"quantization_config.{key}: expected a list of layer names, got {value!r}")
        return tuple(value)
    return ()


def _read_compressed_tensors(config: Mapping[str, Any]) -> Source:
    groups = []
    for name, group in config["config_groups"].items():
        weights = group.get("weights") or {}
        found = {key: weights.get(key) for key in ("num_bits", "type", "strategy", "group_size")}
        wanted = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK}
        if found != wanted:
            raise FourfoldError(
                f"quantization_config.config_groups.{name}: {METHOD} serves weights of {wanted}, this group has {found}"
            )
        scheme = Scheme.W4A4 if group.get("input_activations") else Scheme.W4A16
        groups.append(Group(tuple(group.get("targets") or ["Linear"]), scheme))
    return Source(Layout.COMPRESSED_TENSORS, tuple(groups), _names(config, "ignore"))


def _read_modelopt(config: Mapping[str, Any]) -> Source:
    inner = config.get("quantization") or config
    schemes = {"NVFP4": Scheme.W4A4, "W4A16_NVFP4": Scheme.W4A16}
    algorithm = str(inner.get("quant_algo")).upper()
    if algorithm not in schemes:
        raise FourfoldError(
            f"{METHOD} cannot read a ModelOpt checkpoint of quant_algo {inner.get('quant_algo')!r}; "
            f"it takes {' and '.join(schemes)}"
        )
    size = inner.get("group_size")
    if size is not None and size != BLOCK:
        raise FourfoldError(
            f"quantization_config.group_size: NVFP4 has blocks of {BLOCK}, the checkpoint says {size!r}"
        )
    scheme = schemes[algorithm]
    groups = inner.get("config_groups") or {}
    if groups and all(not group.get("input_activations") for group in groups.values()):
        scheme = Scheme.W4A16
    return Source(Layout.MODELOPT, (Group(("Linear",), scheme),), _names(inner, "exclude_modules", "ignore"))


def _read_fp8(config: Mapping[str, Any]) -> Source:
    block = config.get("weight_block_size")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
        raise FourfoldError(
            f"{METHOD} reads FP8 checkpoints with block scales (weight_block_size, as DeepSeek writes them); "
            f"this one has weight_block_size {block!r}"
        )
    ignore = _names(config, "modules_to_not_convert", "ignored_layers")
    return Source(Layout.FP8_BLOCK, ignore=ignore, block=(block[0], block[1]))

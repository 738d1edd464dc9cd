"""The two vocabularies of NVFP4 checkpoints: tensor names, and the quantisation config.

ModelOpt multiplies by its global scales (``weight_scale_2``, ``input_scale``), compressed-tensors divides by them
(``weight_global_scale``, ``input_global_scale``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fourfold.common import __version__
from fourfold.common.errors import FourfoldError
from fourfold.common.quant.backends.base import Scheme
from fourfold.common.quant.checkpoint.reader import Checkpoint
from fourfold.common.quant.loading import from_nvfp4
from fourfold.common.quant.nvfp4 import BLOCK, NvFp4Tensor
from fourfold.common.quant.source import NVFP4_KEYS, Layout
from fourfold.common.settings import METHOD

# --format: the vocabulary of the tensors, and quant_method.
FORMATS = {
    "compressed-tensors": (Layout.COMPRESSED_TENSORS, "compressed-tensors"),
    "modelopt": (Layout.MODELOPT, "modelopt"),
    "fourfold": (Layout.COMPRESSED_TENSORS, METHOD),
}


def tensors_of(name: str, weight: NvFp4Tensor, input_scale: Tensor | None, layout: Layout) -> dict[str, Tensor]:
    """The tensors of one layer; ``input_scale`` multiplies (``amax / 2688``)."""
    if layout is Layout.MODELOPT:
        tensors = {
            "weight": weight.packed,
            "weight_scale": weight.block_scales,
            "weight_scale_2": weight.global_scale.reshape(()).clone(),
        }
        if input_scale is not None:
            tensors["input_scale"] = input_scale.reshape(())
    else:
        tensors = {
            "weight_packed": weight.packed,
            "weight_scale": weight.block_scales,
            "weight_global_scale": weight.global_scale.reciprocal().reshape(1),
        }
        if input_scale is not None:
            tensors["input_global_scale"] = input_scale.reciprocal().reshape(1)
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def read_layer(checkpoint: Checkpoint, name: str, layout: Layout) -> tuple[NvFp4Tensor, Tensor | None]:
    """Read one layer of an NVFP4 checkpoint: the weight, and the input scale (multiplied) where there is one.

    Raises:
        FourfoldError: a tensor is missing or damaged.
    """
    keys = NVFP4_KEYS[layout]
    packed, scales, weight_global = (checkpoint.tensor(f"{name}.{key}") for key in keys[:3])
    stored = f"{name}.{keys[3]}"
    inputs = checkpoint.tensor(stored).reshape(1) if stored in checkpoint.entries else None
    linear = from_nvfp4(layout, packed, scales, weight_global.reshape(1), inputs, [packed.shape[0]], name)
    return linear.shards()[0], None if linear.input_scales is None else linear.input_scales[0]


def quantization_config(format: str, scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint.

    Args:
        format: a key of `FORMATS`.
        scheme: of every quantised layer.
        ignore: names of the linear layers that are not quantised.

    Raises:
        FourfoldError: unknown format.
    """
    if format not in FORMATS:
        raise FourfoldError(f"--format {format!r}: expected one of {', '.join(FORMATS)}")
    layout, method = FORMATS[format]
    number: dict[str, Any] = {"num_bits": 4, "type": "float", "group_size": BLOCK}
    if layout is Layout.MODELOPT:
        weights = number | {"dynamic": False}
        activations = weights if scheme is Scheme.W4A4 else None
        group = {"weights": weights, "input_activations": activations, "targets": ["Linear"]}
        return {
            "quant_method": method,
            "quant_algo": "NVFP4" if scheme is Scheme.W4A4 else "W4A16_NVFP4",
            "group_size": BLOCK,
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "producer": {"name": "fourfold", "version": __version__},
        }
    number |= {"strategy": "tensor_group", "symmetric": True, "scale_dtype": "torch.float8_e4m3fn"}
    number |= {"zp_dtype": None, "actorder": None, "block_structure": None}
    activations = number | {"dynamic": "local", "observer": "static_minmax", "observer_kwargs": {}}
    weights = number | {"dynamic": False, "observer": "memoryless_minmax", "observer_kwargs": {}}
    return {
        "quant_method": method,
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "format": "nvfp4-pack-quantized",
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations if scheme is Scheme.W4A4 else None,
                "output_activations": None,
            }
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def hf_quant_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """ModelOpt's ``hf_quant_config.json``, the same declaration in the file that older readers expect."""
    algorithm = "NVFP4" if scheme is Scheme.W4A4 else "W4A16_NVFP4"
    inner = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": BLOCK, "exclude_modules": list(ignore)}
    return {"producer": {"name": "fourfold", "version": __version__}, "quantization": inner}

"""Random tensors in the number formats of a config's ``quantization_config``, under the names that hold them there.

Known are what configs of `published` say: FP8 in blocks, MXFP4 experts beside it or packed beside BF16, and ModelOpt's
NVFP4 but for what it ignores, or with FP8 and MXFP8 where it lists each module. The numbers are small; no bit pattern
is infinite or no number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from fourfold.common.recipe.rehearsing.traits import EXPERTS

if TYPE_CHECKING:
    from torch import Tensor

# Tags of a tensor, as the dtype that it has until it is written: a linear layer's weight, an expert's, and a table's
# whose rows are in FP8, 32 numbers to a scale.
DENSE, EXPERT, ROWS = "float8_e4m3fn", "int8", "float8_e8m0fnu"
EIGHTH = 127 - 3  # as an exponent, in a byte
EXPERTS_OF = re.compile(r"\.experts\.\d+\.")
Shapes = dict[str, tuple[tuple[int, ...], str]]  # name to shape and tag


def _format(name: str, tag: str, quantised: Mapping[str, Any], expert_dtype: str) -> str:
    """``plain``, ``fp8`` (a scale to a tensor), ``fp8_block``, ``mxfp8``, ``mxfp4``, ``mxfp4_packed`` or ``nvfp4``."""
    if tag not in (DENSE, EXPERT):
        return "plain"
    if quantised.get("quant_method") == "modelopt":
        module = name.removesuffix(".weight")
        if "quantized_layers" in quantised:  # of the experts of a layer, the first can stand for all
            listed = quantised["quantized_layers"]
            own = listed.get(module) or listed.get(EXPERTS_OF.sub(".experts.0.", module)) or {}
            return {"FP8": "fp8", "MXFP8": "mxfp8", "NVFP4": "nvfp4"}.get(str(own.get("quant_algo")), "plain")
        ignored = any(fnmatchcase(module, pattern) for pattern in quantised.get("ignore", ()))
        return "plain" if ignored or quantised.get("quant_algo") != "NVFP4" else "nvfp4"
    if tag == EXPERT and quantised.get("moe_quant_algo") == "NVFP4" and not name.startswith("mtp."):
        return "nvfp4"
    if tag == EXPERT and quantised.get("format") == "mxfp4-pack-quantized":  # compressed-tensors
        return "mxfp4_packed"
    if tag == EXPERT and expert_dtype == "fp4":
        return "mxfp4"
    return "fp8_block" if quantised.get("weight_block_size") else "plain"


def written(shapes: Shapes, scale: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that the checkpoint holds.

    Args:
        scale: suffix in place of ``weight`` for the scale of a block format.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    quantised = config.get("quantization_config") or {}
    expert_dtype = str(config.get("expert_dtype") or quantised.get("expert_dtype") or "")

    def codes(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(0, 112, (rows, columns), dtype=torch.uint8, generator=generator).view(dtype)

    for name, (shape, tag) in shapes.items():
        stem, kind = name.removesuffix("weight"), _format(name, tag, quantised, expert_dtype)
        if kind == "nvfp4":
            rows, columns = shape
            yield name, codes(rows, columns // 2, torch.uint8)
            yield stem + "weight_scale", torch.full((rows, columns // 16), 0.5).to(torch.float8_e4m3fn)
            yield stem + "weight_scale_2", torch.tensor(2.0**-6)
            yield stem + "input_scale", torch.tensor(2.0**-6)
        elif kind == "fp8":
            rows, columns = shape
            yield name, codes(rows, columns, torch.float8_e4m3fn)
            yield stem + "weight_scale", torch.tensor(2.0**-8)
            yield stem + "input_scale", torch.tensor(2.0**-6)
        elif kind == "mxfp8":
            rows, columns = shape
            yield name, codes(rows, columns, torch.float8_e4m3fn)
            yield stem + scale, torch.full((rows, columns // 32), EIGHTH, dtype=torch.uint8)
        elif kind == "mxfp4_packed":
            rows, columns = shape
            yield stem + "weight_packed", codes(rows, columns // 2, torch.uint8)
            yield stem + "weight_scale", torch.full((rows, columns // 32), EIGHTH, dtype=torch.uint8)
        elif kind == "mxfp4":
            rows, columns = shape
            yield name, codes(rows, columns // 2, torch.int8)
            yield stem + scale, torch.full((rows, columns // 32), 2.0**-6).to(torch.float8_e8m0fnu)
        elif kind == "fp8_block":
            rows, columns = shape
            block = quantised["weight_block_size"]
            yield name, codes(rows, columns, torch.float8_e4m3fn)
            scales = torch.full((math.ceil(rows / block[0]), math.ceil(columns / block[1])), 2.0**-8)
            micro = quantised.get("scale_fmt") == "ue8m0" and expert_dtype != "fp8"
            yield stem + scale, scales.to(torch.float8_e8m0fnu) if micro else scales
        elif tag == ROWS:
            rows, columns = shape
            yield name, codes(rows, columns, torch.float8_e4m3fn)
            yield stem + scale, torch.full((rows, columns // 32), 2.0**-8).to(torch.float8_e8m0fnu)
        elif tag.startswith(("int", "uint")) and tag != EXPERT:
            most = next((config[key] for key in EXPERTS if config.get(key)), 1)
            yield name, torch.randint(0, most, shape, generator=generator).to(getattr(torch, tag))
        else:
            dtype = torch.bfloat16 if tag in (DENSE, EXPERT) else getattr(torch, tag)
            values = torch.randn(shape, generator=generator) * 0.02 + (1.0 if "norm" in name else 0.0)
            yield name, values.to(dtype)

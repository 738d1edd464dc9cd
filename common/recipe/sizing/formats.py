"""Number formats of weights: bytes of a parameter with its block scales, and the names that people give them."""

from __future__ import annotations

import difflib

from fourfold.common.errors import FourfoldError

# Bytes of one parameter. A block scale is added where the format has one: UE8M0 is one byte for 32 values (MXFP4,
# MXFP8; OCP Microscaling 1.0), E4M3 one byte for 16 (NVFP4), float32 four for 128 x 128 (DeepSeek's FP8 blocks).
BYTES: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block128": 1.0 + 4 / 128**2,
    "fp8_block32": 1.0 + 1 / 32**2,
    "mxfp8": 1.0 + 1 / 32,
    "int8": 1.0,
    "mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
    "int4": 0.5 + 2 / 128,
    "int64": 8.0,
}
_OTHER_NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "fp8_e4m3": "fp8",
    "fp8_per_tensor": "fp8",
    "fp8_per_channel": "fp8",
    "fp8_block": "fp8_block128",
    "fp8_blockwise": "fp8_block128",
    "fp8_128x128": "fp8_block128",
    "fp8_32x32": "fp8_block32",
    "fp4": "mxfp4",
    "w4a16": "int4",
}
# The dtype whose matrix units compute with such weights; weights alone at four bits multiply as BF16.
COMPUTE = {"nvfp4": "fp4", "mxfp4": "fp8", "fp8": "fp8", "fp8_block128": "fp8", "fp8_block32": "fp8", "mxfp8": "fp8"}


def format_named(text: str, where: str) -> str:
    """The key of `BYTES` for a format as written.

    Raises:
        FourfoldError: unknown; names ``where``.
    """
    name = text.strip().lower().replace("-", "_").replace("torch.", "")
    name = _OTHER_NAMES.get(name, name)
    if name not in BYTES:
        near = difflib.get_close_matches(name, [*BYTES, *_OTHER_NAMES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(BYTES)}"
        raise FourfoldError(f"{where}: format {text!r}; {hint}")
    return name


def block_fp8(block: object, scale: object) -> str:
    """The format of FP8 weights with scales for blocks of ``block`` values."""
    if isinstance(block, list) and block:
        return "fp8_block32" if block[-1] == 32 and len(block) == 2 else "fp8_block128"
    return "fp8"

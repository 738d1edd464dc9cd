"""Backends that multiply NVFP4 layers, in order of preference."""

from __future__ import annotations

from fourfold.common.quant.backends.base import Backend, LayerSpec, PreparedLinear, Requirements, Scheme, Selection
from fourfold.common.quant.backends.base import select as _select
from fourfold.common.quant.backends.cpu import INT8, INT16, CpuBackend
from fourfold.common.quant.backends.reference import ReferenceBackend

BACKENDS: dict[str, Backend] = {
    b.name: b for b in (CpuBackend("cpu", INT8), CpuBackend("cpu_int16", INT16), ReferenceBackend())
}

__all__ = [
    "BACKENDS",
    "Backend",
    "LayerSpec",
    "PreparedLinear",
    "Requirements",
    "Scheme",
    "Selection",
    "select",
]


def select(spec: LayerSpec, wanted: str = "auto") -> Selection:
    """Choose the backend for a layer among all of fourfold's; see `base.select`."""
    return _select(BACKENDS, spec, wanted)

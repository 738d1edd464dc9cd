"""What a backend is, and how one is chosen for a layer.

A backend turns an `NvFp4Linear` into a `PreparedLinear`, the module that multiplies. It declares what it needs
in `Requirements` and refuses a layer with a reason; `select` takes the first backend that accepts, in the order of
preference, and returns the reasons of the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata
from typing import ClassVar

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn

from fourfold.common.errors import FourfoldError
from fourfold.common.quant.linear import NvFp4Linear


class Scheme(str, Enum):
    """What the matrix product multiplies: NVFP4 weights with 16-bit or with NVFP4 activations."""

    W4A16 = "w4a16"
    W4A4 = "w4a4"


@dataclass(frozen=True)
class LayerSpec:
    """What a backend is asked to serve: W ``[rows, columns]`` under ``scheme`` for activations of ``dtype``."""

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    scheme: Scheme


@dataclass(frozen=True)
class Requirements:
    """Conditions that a backend declares. Empty means any.

    Attributes:
        devices: torch device types.
        min_capability: least CUDA compute capability, for devices of type ``cuda``.
        dtypes: activation dtypes.
        schemes: supported schemes.
        row_multiple, column_multiple: divisors of the shape.
        libraries: distribution name to version specifier.
    """

    devices: tuple[str, ...] = ()
    min_capability: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    schemes: tuple[Scheme, ...] = ()
    row_multiple: int = 1
    column_multiple: int = 16
    libraries: Mapping[str, str] = field(default_factory=dict)

    def refuse(self, spec: LayerSpec) -> str | None:
        """Return the first unmet condition as a sentence fragment, or None."""
        if self.devices and spec.device.type not in self.devices:
            return f"needs device {' or '.join(self.devices)}, the layer is on {spec.device.type}"
        if self.min_capability and spec.device.type == "cuda":
            found = torch.cuda.get_device_capability(spec.device)
            if found < self.min_capability:
                return f"needs compute capability {self.min_capability}, the device has {found}"
        if self.dtypes and spec.dtype not in self.dtypes:
            return f"needs activations of {' or '.join(map(str, self.dtypes))}, they are {spec.dtype}"
        if self.schemes and spec.scheme not in self.schemes:
            return f"does not serve {spec.scheme.value}"
        if spec.rows % self.row_multiple:
            return f"needs a multiple of {self.row_multiple} output features, there are {spec.rows}"
        if spec.columns % self.column_multiple:
            return f"needs a multiple of {self.column_multiple} input features, there are {spec.columns}"
        for name, wanted in self.libraries.items():
            try:
                found_version = metadata.version(name)
            except metadata.PackageNotFoundError:
                return f"needs {name}{wanted}, which is not installed"
            if not SpecifierSet(wanted).contains(found_version, prereleases=True):
                return f"needs {name}{wanted}, {found_version} is installed"
        return None


class PreparedLinear(nn.Module, ABC):
    """A layer in the layout that its backend multiplies; its tensors are buffers, so the module moves and compiles."""

    @abstractmethod
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x W^T + bias``: x ``[..., K]`` to ``[..., N]`` in x's dtype, accumulated in float32."""


class Backend(ABC):
    """One way to serve NVFP4 linear layers."""

    name: str
    requires: ClassVar[Requirements] = Requirements()

    def refuse(self, spec: LayerSpec) -> str | None:
        """Return why this backend cannot serve the layer, or None. Subclasses add what they find at run time."""
        return self.requires.refuse(spec)

    @abstractmethod
    def prepare(self, linear: NvFp4Linear, scheme: Scheme) -> PreparedLinear:
        """Repack a layer. The result does not keep ``linear``'s tensors alive unless it uses them as they are."""


@dataclass(frozen=True)
class Selection:
    """The backend chosen for a layer, and why the ones preferred to it refused."""

    backend: Backend
    refused: dict[str, str]


def select(backends: Mapping[str, Backend], spec: LayerSpec, wanted: str = "auto") -> Selection:
    """Choose a backend.

    Args:
        backends: name to backend, in order of preference.
        spec: the layer.
        wanted: a backend's name, or ``auto`` for the first that accepts.

    Raises:
        FourfoldError: the wanted backend is unknown or refuses, or none accepts; the message has the reasons.
    """
    if wanted != "auto" and wanted not in backends:
        raise FourfoldError(f"backend {wanted!r} is unknown; known: auto, {', '.join(backends)}")
    refused: dict[str, str] = {}
    for name, backend in backends.items():
        if wanted not in ("auto", name):
            continue
        reason = backend.refuse(spec)
        if reason is None:
            return Selection(backend, refused)
        refused[name] = reason
    reasons = "; ".join(f"{name} {reason}" for name, reason in refused.items())
    raise FourfoldError(f"no NVFP4 backend serves {spec.rows}x{spec.columns} {spec.scheme.value}: {reasons}")

"""A CUDA machine for vLLM 0.32 that is not there: enough of its platform for a configuration to resolve.

The class is vLLM's own platform for CUDA; what it would ask a driver is answered from a hardware sheet. Nothing of
vLLM's configuration is replaced. What vLLM asks a child process about a model's class, it asks here.
"""

from __future__ import annotations

import re
import sys
import traceback
from importlib.machinery import ModuleSpec
from typing import Any

# Not all compiled modules: where _flashmla_C is absent, vLLM puts placeholders in its place itself.
COMPILED = re.compile(r"vllm\.(_C_stable_libtorch|_moe_C_stable_libtorch|vllm_flash_attn\._vllm_fa[23]_C)$")
machine: dict[str, Any] = {}


class Kernels:
    """Empty modules for vLLM's compiled kernels where this build has none; resolving calls none of them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if COMPILED.match(name) else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        return None


def become(sheet: dict[str, Any]) -> None:
    """Be the machine of ``sheet``: name, capability, memory in bytes, count."""
    machine.clear()
    machine.update(sheet)


def install(sheet: dict[str, Any]) -> None:
    """Make vLLM's current platform a simulated one. Before anything else of vLLM is imported."""
    become(sheet)
    sys.meta_path.append(Kernels())  # type: ignore[arg-type]
    import vllm.platforms

    vllm.platforms.vllm_version_matches_substr = lambda text: False  # Triton is asked for without CUDA, too
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class Simulated(cuda.CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*machine["capability"])

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"NVIDIA {machine['name']}"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return machine["memory"]

        @classmethod
        def device_count(cls) -> int:
            return machine["count"]

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True

        def is_cumem_allocator_available(self) -> bool:
            return True

        @classmethod
        def get_all_device_numa_nodes(cls) -> list[int]:
            return [0] * machine["count"]

    vllm.platforms._current_platform = Simulated()
    _operations()
    from vllm.model_executor.models import registry

    in_child = registry._run_in_subprocess

    def ask(question: Any) -> Any:
        """Here, where the machine is the simulated one; in a child, on the machine that there is, where that fails."""
        try:
            return question()
        except (ImportError, AttributeError, NotImplementedError, RuntimeError):
            traceback.print_exc()
            return in_child(question)

    registry._run_in_subprocess = ask


def _operations() -> None:
    """Questions to kernels that this build lacks, of what they support: all."""
    import torch._ops

    namespace: Any = torch._ops._OpNamespace
    lookup = namespace.__getattr__

    def find(self: Any, name: str) -> Any:
        try:
            return lookup(self, name)
        except AttributeError:
            if "supports" not in name or not self.name.endswith("_C"):
                raise
            return lambda *arguments, **named: True

    namespace.__getattr__ = find

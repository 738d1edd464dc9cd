"""A CUDA machine for vLLM 0.32 that is not there: enough of its platform for a configuration to resolve.

The class is vLLM's own platform for CUDA; what it would ask a driver is answered from a hardware sheet. Nothing of
vLLM's configuration is replaced. What vLLM asks a child process about a model's class, it asks here.
"""

from __future__ import annotations

import sys
import types
from typing import Any

COMPILED = ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch")
machine: dict[str, Any] = {}


def become(sheet: dict[str, Any]) -> None:
    """Be the machine of ``sheet``: name, capability, memory in bytes, count."""
    machine.clear()
    machine.update(sheet)


def install(sheet: dict[str, Any]) -> None:
    """Make vLLM's current platform a simulated one. Before anything else of vLLM is imported."""
    become(sheet)
    for name in COMPILED:  # a build for CPUs has no such kernels; resolving calls none
        sys.modules.setdefault(name, types.ModuleType(name))
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
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda ask: ask()  # a child would see this machine

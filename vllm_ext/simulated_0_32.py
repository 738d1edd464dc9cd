"""A CUDA machine for vLLM 0.32 that is not there: enough of its platform for a configuration to resolve.

The class is vLLM's own platform for CUDA; what it would ask a driver is answered from a hardware sheet. What vLLM asks
a child process about a model's class, it asks here. One step of the configuration is left out: the token ids of a
reasoning parser's marks, for which a recipe's model has no tokenizer.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

# Not all compiled modules: where _flashmla_C is absent, vLLM puts placeholders in its place itself.
COMPILED = re.compile(r"vllm\.(_C_stable_libtorch|_moe_C_stable_libtorch|vllm_flash_attn\._vllm_fa[23]_C)$")
machine: dict[str, Any] = {}


class Placeholder(type):
    """Classes all whose attributes are themselves."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Anything(metaclass=Placeholder):
    """In place of each name of torchvision, which modules of processors import and a configuration does not use."""


class Absent(Loader, MetaPathFinder):
    """Modules that this build lacks and resolving does not call: vLLM's compiled kernels (empty) and torchvision."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        vision = fullname.partition(".")[0] == "torchvision"
        return ModuleSpec(fullname, self, is_package=vision) if vision or COMPILED.match(fullname) else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        if module.__name__.startswith("torchvision"):
            module.__version__ = "0"
            module.__getattr__ = lambda name: getattr(Anything, name)


def become(sheet: dict[str, Any]) -> None:
    """Be the machine of ``sheet``: name, capability, memory in bytes, count."""
    machine.clear()
    machine.update(sheet)


def install(sheet: dict[str, Any]) -> None:
    """Make vLLM's current platform a simulated one. Before anything else of vLLM is imported."""
    become(sheet)
    sys.meta_path.append(Absent())
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
    stand_in(lambda name: "supports" in name, _supported)
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
    _reasoning()


def _reasoning() -> None:
    """A reasoning parser must be one that vLLM knows; its marks are not looked up in a tokenizer."""
    from vllm.config.reasoning import ReasoningConfig
    from vllm.reasoning import ReasoningParserManager

    def known(self: Any, model_config: Any) -> None:
        if self.reasoning_parser:
            ReasoningParserManager.get_reasoning_parser(self.reasoning_parser)
        self._enabled = True

    ReasoningConfig.initialize_token_ids = known


def stand_in(wanted: Callable[[str], bool], make: Callable[[str], Any]) -> None:
    """Let ``make`` of its path stand for each operation that this build lacks and whose name is ``wanted``."""
    import torch._ops

    namespace: Any = torch._ops._OpNamespace
    lookup = namespace.__getattr__

    def find(self: Any, name: str) -> Any:
        try:
            return lookup(self, name)
        except AttributeError:
            if not wanted(name) or not self.name.endswith("_C"):
                raise
            return make(f"{self.name}.{name}")

    namespace.__getattr__ = find


def _supported(path: str) -> Any:
    """The answer to what a kernel supports: all."""
    return lambda *arguments, **named: True

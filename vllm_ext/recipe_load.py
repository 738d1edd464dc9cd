"""vLLM's own classes of a checkpoint, built on a simulated machine, for `fourfold.common.recipe.rehearsing.loader`.

Runs in a process of its own. The machine's memory is this machine's: parameters are ordinary tensors, streams and
events of CUDA are placeholders. Nothing is computed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import torch

from fourfold.common.recipe.check import probe
from fourfold.common.recipe.rehearsing.placement import Here, NeedsGPU, Nothing
from fourfold.common.serving import free_port
from fourfold.vllm_ext import recipe_probe

BUNDLED = re.compile(
    r"(vllm\.third_party\.(deep_gemm|fmha_sm100)|vllm\._flashkda_C|flashinfer|cutlass|cuda|quack)(\..*)?$"
)
IGNORED = re.compile("(?!)")  # nothing
PROCESSORS = 148  # of a B200; no parameter depends on it
LANGUAGES = ("cutlass", "cuda")  # whose names kernels are written with

FROM_TARGET = ("embed_tokens", "lm_head", "shared_head.head")
DEFAULTS = ("k_scale", "v_scale", "q_scale", "prob_scale", "mask_embedding")  # of DSpark, which some bring


class Kernel:
    """A kernel of a GPU that this build lacks."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, overload: str) -> Kernel:
        if overload.startswith("__"):
            raise AttributeError(overload)
        return self

    def __or__(self, other: Any) -> Any:  # where it is a type
        return other

    __ror__ = __or__

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise NeedsGPU(f"{self.name} needs a GPU")


class Word(type):
    """In a language of kernels: its names, decorators and types are all the same class, which does nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        return cls


class Words(metaclass=Word):
    """See `Word`."""


class Bundled(Loader, MetaPathFinder):
    """Packages that vLLM's build for CUDA brings along or requires, with kernels alone in them."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if BUNDLED.match(fullname) else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        written = module.__name__.partition(".")[0] in LANGUAGES

        def find(name: str) -> Any:
            if name.startswith("__"):  # marks of modules
                raise AttributeError(name)
            return Words if written else Kernel(f"{module.__name__}.{name}")

        module.__getattr__ = find


def _no_bytes(*sizes: int) -> int:
    """What a kernel wants for itself while it runs: layers ask when they are built."""
    return 0


def _properties(device: Any = None) -> Any:
    """What a driver would say of the machine; layers size their buffers by the number of processors."""
    machine = recipe_probe.simulation.machine
    major, minor = machine["capability"]
    return SimpleNamespace(
        name=machine["name"],
        major=major,
        minor=minor,
        total_memory=machine["memory"],
        multi_processor_count=PROCESSORS,
        shared_memory_per_block_optin=227 << 10,
    )


def models(request: dict[str, Any]) -> Iterator[tuple[str, torch.nn.Module, tuple[str, ...]]]:
    """Role (``target``, ``draft``) and model of each class of the checkpoint, and parts that need no tensor of it."""
    if request["machine"] is not None:
        os.environ["VLLM_HAS_FLASHINFER_CUBIN"] = "1"  # as in an image for CUDA
    recipe_probe.start(request, probe.load, probe.Refused)
    if recipe_probe.simulation is not None:
        import vllm.platforms

        vllm.platforms.current_platform.device_type = "cpu"
        torch.cuda.Stream = torch.cuda.Event = Nothing  # type: ignore[misc,assignment]
        torch.cuda.get_device_properties = _properties  # type: ignore[assignment]
        torch.accelerator.current_device_index = lambda: 0
        torch.accelerator.empty_cache = lambda: None
        sys.meta_path.append(Bundled())
    from vllm.config.vllm import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.v1.worker.workspace import init_workspace_manager

    arguments = recipe_probe.parse(request["model"], request["arguments"])
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    if recipe_probe.simulation is not None:
        # Names of vLLM's kernels, which its layers take when they are built: only now, for modules ask at import which
        # there are.
        recipe_probe.simulation.stand_in(lambda name: name == "get_workspace_size", lambda path: _no_bytes)
        recipe_probe.simulation.stand_in(lambda name: not name.startswith("__"), Kernel)
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.set_default_dtype(config.model_config.dtype)
    with set_current_vllm_config(config), torch.device("cpu"), Here():
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        init_workspace_manager(torch.device("cpu"))
        yield "target", initialize_model(config), DEFAULTS
        speculation = config.speculative_config
        if speculation is not None:
            draft = initialize_model(
                speculation.apply_draft_overrides(config), model_config=speculation.draft_model_config
            )
            yield "draft", draft, (*FROM_TARGET, *DEFAULTS)

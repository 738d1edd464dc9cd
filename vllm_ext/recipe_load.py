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
from typing import Any

import torch

from fourfold.common.recipe.check import probe
from fourfold.common.recipe.rehearsing.placement import NeedsGPU
from fourfold.common.serving import free_port
from fourfold.vllm_ext import recipe_probe

BUNDLED = re.compile(r"(vllm\.third_party\.deep_gemm|flashinfer)(\..*)?$")


class Nothing:
    """A stream or an event of a GPU, which loading does not use."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


class Kernel:
    """A kernel of a GPU that this build lacks."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, overload: str) -> Kernel:
        if overload.startswith("__"):
            raise AttributeError(overload)
        return self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise NeedsGPU(f"{self.name} needs a GPU")


def kernel(name: str) -> Kernel:
    """One of a package; marks of modules are not kernels."""
    if name.rpartition(".")[2].startswith("__"):
        raise AttributeError(name)
    return Kernel(name)


class Bundled(Loader, MetaPathFinder):
    """Packages that vLLM's build for CUDA brings along or requires, with kernels alone in them."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if BUNDLED.match(fullname) else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        module.__getattr__ = lambda name: kernel(f"{module.__name__}.{name}")


def _kernels() -> None:
    """Names of vLLM's kernels, which its layers take when they are built; this build has none to call."""
    import torch._ops

    namespace: Any = torch._ops._OpNamespace
    lookup = namespace.__getattr__

    def find(self: Any, name: str) -> Any:
        try:
            return lookup(self, name)
        except AttributeError:
            if name.startswith("__") or not self.name.endswith("_C"):
                raise
            return Kernel(f"{self.name}.{name}")

    namespace.__getattr__ = find


def models(request: dict[str, Any]) -> Iterator[tuple[str, torch.nn.Module, tuple[str, ...]]]:
    """Role (``target``, ``draft``) and model of each class of the checkpoint, and what it takes from the target."""
    if request["machine"] is not None:
        os.environ["VLLM_HAS_FLASHINFER_CUBIN"] = "1"  # as in an image for CUDA
    recipe_probe.start(request, probe.load, probe.Refused)
    if recipe_probe.simulation is not None:
        import vllm.platforms

        vllm.platforms.current_platform.device_type = "cpu"
        torch.cuda.Stream = torch.cuda.Event = Nothing  # type: ignore[misc,assignment]
        sys.meta_path.append(Bundled())
    from vllm.config.vllm import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    arguments = recipe_probe.parse(request["model"], request["arguments"])
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    if recipe_probe.simulation is not None:
        _kernels()  # only now: modules ask at import which kernels there are
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.set_default_dtype(config.model_config.dtype)
    with set_current_vllm_config(config), torch.device("cpu"):
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        yield "target", initialize_model(config), ()
        speculation = config.speculative_config
        if speculation is not None:
            draft = initialize_model(
                speculation.apply_draft_overrides(config), model_config=speculation.draft_model_config
            )
            yield "draft", draft, ("embed_tokens", "lm_head", "shared_head.head")

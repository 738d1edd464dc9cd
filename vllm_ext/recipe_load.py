"""vLLM's own classes of a checkpoint, built on a simulated machine, for `fourfold.common.recipe.rehearsing.loader`.

Runs in a process of its own. The machine's memory is this machine's: parameters are ordinary tensors, streams and
events of CUDA are placeholders. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fourfold.common.recipe.check import probe
from fourfold.vllm_ext import recipe_probe


class Nothing:
    """A stream or an event of a GPU, which loading does not use."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


def models(request: dict[str, Any]) -> Iterator[tuple[str, torch.nn.Module, tuple[str, ...]]]:
    """Role (``target``, ``draft``) and model of each class of the checkpoint, and what it takes from the target."""
    recipe_probe.start(request, probe.load, probe.Refused)
    if recipe_probe.simulation is not None:
        from vllm import platforms

        platforms.current_platform.device_type = "cpu"
        torch.cuda.Stream = torch.cuda.Event = Nothing  # type: ignore[misc,assignment]
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_open_port
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = recipe_probe.parse(request["model"], request["arguments"])
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    address = f"tcp://127.0.0.1:{get_open_port()}"
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        yield "target", initialize_model(config), ()
        speculation = config.speculative_config
        if speculation is not None:
            draft = initialize_model(
                speculation.apply_draft_overrides(config), model_config=speculation.draft_model_config
            )
            yield "draft", draft, ("embed_tokens", "lm_head", "shared_head.head")

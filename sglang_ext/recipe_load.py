"""SGLang's own classes of a checkpoint, built on a simulated machine, for `fourfold.common.recipe.rehearsing.loader`.

Runs in a process of its own. The configuration resolves for the machine; what is built lies in this machine's memory,
by the code that SGLang has for machines without CUDA: its kernels are chosen when its modules are imported, and this
build has none. Nothing is computed.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from fourfold.common.recipe.check import probe
from fourfold.common.recipe.rehearsing.placement import Here, NeedsGPU, Nothing
from fourfold.common.serving import free_port
from fourfold.sglang_ext import recipe_probe

FROM_TARGET = ("embed_tokens", "lm_head")
# Of DSpark the head that is built to verify ragged drafts, and routes of images, which its loader leaves out; what a
# head of DeepSeek's layout repeats of the target.
IGNORED = re.compile(
    r"mtp\.\d+\.(confidence_head\..*|ffn\.gate\.bias_vl)|"
    r"draft: confidence_head\..*|"
    r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight"
)
# Or made of others; of MXFP4 experts zeros; of MiniMax's tower a norm that is built and never applied.
DEFAULTS = (
    *("k_scale", "v_scale", "w13_blockscale_swizzled", "w2_blockscale_swizzled", "w13_weight_bias", "w2_weight_bias"),
    "vision_tower.vision_model.post_layernorm",
)


def _rotation(*arguments: Any, **named: Any) -> Any:
    raise NeedsGPU("the kernel of rotations needs a GPU")


def _without_kernels() -> None:
    """Where there is neither CUDA nor a processor that SGLang knows, its rotations take vLLM's kernel."""
    if importlib.util.find_spec("vllm") is None:
        kernels: Any = ModuleType("vllm._custom_ops")
        kernels.rotary_embedding = _rotation
        sys.modules |= {"vllm": ModuleType("vllm"), "vllm._custom_ops": kernels}


def models(request: dict[str, Any]) -> Iterator[tuple[str, torch.nn.Module, tuple[str, ...]]]:
    """Role (``target``, ``draft``) and model of each class of the checkpoint, and parts that need no tensor of it."""
    recipe_probe.start(request, probe.load, probe.Refused)
    arguments = recipe_probe.parse(request["model"], request["arguments"])
    if recipe_probe.simulation is not None:
        arguments.device = "cuda"
        torch.cuda.Stream = torch.cuda.Event = Nothing  # type: ignore[misc,assignment]
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs.from_cli_args(arguments)
    server_args.resolve_once()
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap, parallel_state
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.layers.rotary_embedding import rope_variant
    from sglang.srt.model_loader import loader
    from sglang.srt.runtime_context import SpawnRanks, publish

    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    parallel_state.init_distributed_environment(
        backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=f"tcp://127.0.0.1:{free_port()}"
    )
    parallel_state.initialize_model_parallel()
    initialize_dp_attention(server_args=server_args)
    _without_kernels()
    rope_variant.get_device = lambda: "cpu"
    initialize_moe_config()
    initialize_fp8_gemm_config()
    initialize_fp4_gemm_config()
    for role in ("target", "draft") if request["draft"] else ("target",):
        path = request["draft_model" if role == "draft" else "model"]
        config = ModelConfig.from_server_args(server_args, model_path=path, is_draft_model=role == "draft")
        if role == "target":
            bootstrap.init_layer_runtime(model_config=config)
        load_config = LoadConfig()
        quantised = loader._get_quantization_config(config, load_config)
        torch.set_default_dtype(config.dtype)
        with torch.device("cpu"), Here():
            model = loader._initialize_model(config, load_config, quantised)
            yield role, model, DEFAULTS if role == "target" else (*FROM_TARGET, *DEFAULTS)

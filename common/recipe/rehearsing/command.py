"""``fourfold recipe rehearse``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.common.recipe.options import Roots

if TYPE_CHECKING:
    from fourfold.common.recipe.rehearsing.rehearse import Result


def rehearse(
    recipe: Annotated[str, typer.Argument(help="Id of a recipe, or its file.")],
    engine: Annotated[str, typer.Option(help="vllm or sglang: the engine of this environment.")],
    write: Annotated[bool, typer.Option(help="Keep a passed rehearsal as proof (level 5).")] = False,
    logs: Annotated[Path | None, typer.Option(help="Folder for the servers' logs. Default: a new one.")] = None,
    together: Annotated[bool, typer.Option(help="Of prefill and decode only decode's flags, in one server.")] = False,
    catalogue: Roots = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a recipe's flags on the real engine on a processor, with a small random model; 1: a check failed.

    Says what it replaced for that, and what it could not rehearse.
    """
    from rich.console import Console

    from fourfold.common.recipe.check.proofs import record_rehearsal
    from fourfold.common.recipe.loading import Catalogue
    from fourfold.common.recipe.rehearsing.rehearse import rehearse as run
    from fourfold.common.serving import termination_raises

    known = Catalogue(catalogue)
    with termination_raises(KeyboardInterrupt()), Console(stderr=True).status("starting") as status:
        result = run(known, recipe, engine, logs, tick=status.update, together=together)
    if write and result.ok:
        apart = None if result.apart is None else ", ".join(result.apart.values())
        loaded = None if result.loaded is None or result.loaded.unable else " and ".join(result.loaded.classes)
        path = record_rehearsal(known.recipe(recipe), known, engine, result.version, apart, loaded)
        typer.echo(f"proof in {path}", err=True)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1, default=str))
    else:
        _print(result)
    raise typer.Exit(not result.ok)


def _print(result: Result) -> None:
    replica = result.replica
    kind = "the same architecture" if replica["exact"] else f"a {replica['family']} that stands for it"
    typer.echo(
        f"{result.recipe} on {result.engine} {result.version}: {replica['architecture']}, {kind}, on a processor"
    )
    if result.apart is not None:
        typer.echo(f"prefill and decode ran apart: {', '.join(result.apart.values())}")
    for check in result.checks:
        typer.echo(f"{'ok    ' if check.ok else 'FAILED'} {check.name}: {check.detail}")
    if result.loaded is not None and result.loaded.layers:
        typer.echo(f"loaded on the real classes, on {result.loaded.where}:")
        for line in result.loaded.lines():
            typer.echo(f"  {line}")
    typer.echo("replaced:" if result.substitutions else "replaced: nothing")
    for change in result.substitutions:
        used = "left out" if change.used is None else json.dumps(change.used, default=str)
        typer.echo(f"  {change.what}: {json.dumps(change.requested, default=str)} -> {used} ({change.why})")
    typer.echo("not rehearsed:")
    for line in result.not_rehearsed:
        typer.echo(f"  {line}")

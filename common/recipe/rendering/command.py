"""``fourfold recipe render``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.options import Roots

if TYPE_CHECKING:
    from fourfold.common.recipe.loading import Catalogue
    from fourfold.common.recipe.rendering.layout import Layout, Rendered

TARGETS = ("bash", "docker", "slurm", "srtctl", "lws", "dynamo", "llm-d")


def render(
    recipe: Annotated[str, typer.Argument(help="Id of a recipe, or its file.")],
    engine: Annotated[str, typer.Option(help="vllm or sglang.")],
    target: Annotated[str, typer.Option(help=f"What starts it: {', '.join(TARGETS)}.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the files; it must not hold any of them.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Path or repository of the weights. Default: the recipe's repository.")
    ] = None,
    catalogue: Roots = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print files and notes as JSON.")] = False,
) -> None:
    """Write the files that launch a recipe: ranks, addresses, environment, health probes, NVLink domains, router."""
    from fourfold.common.recipe.loading import Catalogue

    made = rendered(Catalogue(catalogue), recipe, engine, target, model)
    if out is not None:
        write(made.files, out)
    if as_json:
        typer.echo(json.dumps({"files": made.files, "notes": made.notes}, indent=1))
        return
    for name, text in made.files.items():
        if out is not None:
            typer.echo(str(out / name))
        else:
            typer.echo(f"==> {name} <==\n{text}" if len(made.files) > 1 else text, nl=len(made.files) > 1)
    for note in made.notes:
        typer.echo(f"note: {note}", err=True)


def rendered(known: Catalogue, recipe: str | Path, engine: str, target: str, model: str | None = None) -> Rendered:
    """The files of a target.

    Raises:
        FourfoldError: no such recipe, engine or target, or the target cannot say what the recipe does.
    """
    from fourfold.common.recipe.rendering.layout import Rendered, draft_notes, layout

    if target not in TARGETS:
        raise FourfoldError(f"--target {target}: expected {', '.join(TARGETS)}")
    found = known.recipe(recipe)
    card, sheet = known.model(found.model), known.hardware(found.hardware)
    packed = target in ("bash", "docker", "slurm")
    of = layout(found, engine, card, sheet, model, packed=packed)
    made = _maker(target)(of)
    return Rendered(made.files, made.notes + draft_notes(of))


def _maker(target: str) -> Callable[[Layout], Rendered]:
    from fourfold.common.recipe.rendering import dynamo, llmd, lws, scripts, srtctl

    makers = {"bash": scripts.bash, "docker": scripts.docker, "slurm": scripts.slurm, "srtctl": srtctl.srtctl}
    return (makers | {"lws": lws.lws, "dynamo": dynamo.dynamo, "llm-d": llmd.llm_d})[target]


def write(files: dict[str, str], out: Path) -> None:
    """Write all files, or none.

    Raises:
        FourfoldError: one of them is there already, or the folder cannot be written.
    """
    there = [name for name in files if (out / name).exists()]
    if there:
        raise FourfoldError(f"--out {out}: {', '.join(there)} there already; take another folder or remove them")
    done: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = out / name
            done.append(path)
            path.write_text(text)
            if text.startswith("#!"):
                path.chmod(0o755)
    except OSError as error:
        for path in done:
            path.unlink(missing_ok=True)
        raise FourfoldError(f"--out {out}: {error}") from None

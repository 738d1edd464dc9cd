"""``fourfold recipe new``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fourfold.common.recipe.options import Json, Roots


def new(
    model: Annotated[Path, typer.Argument(help="Model directory, or its config.json; weights need not be there.")],
    hardware: Annotated[str, typer.Option(help="Hardware sheet, such as gb300-nvl72, gb200-nvl72, b200, h200 or cpu.")],
    workload: Annotated[
        str,
        typer.Option(
            help="chat: few fast streams; fixed: throughput of equal requests; agentic: long shared prefixes."
        ),
    ] = "chat",
    out: Annotated[Path | None, typer.Option(help="Catalogue to write to. Default: recipes-NAME.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model card. Default: the directory's.")] = None,
    repo: Annotated[str | None, typer.Option(help="Repository that the engines load, ORG/NAME.")] = None,
    nvfp4: Annotated[bool, typer.Option(help="Quantise 16-bit weights to NVFP4 while loading, with fourfold.")] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests over the whole deployment. Default: what fits.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
    catalogue: Roots = None,
    as_json: Json = False,
) -> None:
    """Write a first recipe for a model that nobody has seen, for both engines, with a list of what to confirm.

    Parallelism, formats, speculation and flags follow from what config.json and the index of the weights say, not from
    the model's name. Needs no network, no engine and no weights. Exit status 2: bad input, or nothing of this hardware
    holds the model.
    """
    from fourfold.common.recipe.dayzero.compose import WORKLOADS, compose, name_of
    from fourfold.common.recipe.dayzero.source import read_model
    from fourfold.common.recipe.dayzero.writing import write
    from fourfold.common.recipe.loading import Catalogue, nearest

    if workload not in WORKLOADS:
        from fourfold.common.errors import FourfoldError

        raise FourfoldError(f"--workload {workload}: no such workload{nearest(workload, WORKLOADS)}")
    known = Catalogue(catalogue)
    longer = [sheet for sheet in known.names("hardware") if sheet.startswith(f"{hardware}-")]
    if hardware not in known.names("hardware") and len(longer) == 1:
        hardware = longer[0]  # gb300: there is one kind of it
    sheet = known.hardware(hardware, "--hardware")
    found = read_model(model)
    named = name_of(found, name)
    composed = compose(found, sheet, workload, named, repo, nvfp4, concurrency)
    folder = out if out is not None else Path(f"recipes-{named}")
    paths = write(folder, found, composed, force, list(catalogue or []))
    layout = composed.layout
    if as_json:
        data = {
            "recipe": str(paths["recipe"]),
            "card": str(paths["card"]),
            "config": str(paths["config"]),
            "id": composed.recipe["id"],
            "parallel": layout.parallel.model_dump(),
            "gpus": layout.parallel.world,
            "weight_bytes_per_rank": round(layout.weights),
            "requests_per_data_rank": layout.sequences,
            "speculation": composed.recipe.get("speculation"),
            "unknown_traits": composed.unknown,
            "notes": composed.recipe["notes"],
            "confirm": composed.confirm,
        }
        typer.echo(json.dumps(data, indent=1))
        return
    typer.echo(f"Wrote {paths['recipe']}, with {paths['card']} and {paths['config'].name} beside it.")
    for note in composed.recipe["notes"]:
        typer.echo(f"- {note}")
    typer.echo(f"Next: fourfold recipe show {paths['recipe']} --catalogue {folder}")
    typer.echo(f"      fourfold recipe check {paths['recipe']} --catalogue {folder}")

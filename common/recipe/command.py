"""``fourfold recipe``: one module for each subcommand; this one lists them, and prints the schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fourfold.common.recipe.check.command import check, matrix, snapshot
from fourfold.common.recipe.dayzero.command import new
from fourfold.common.recipe.importing.command import import_
from fourfold.common.recipe.options import Json, Roots
from fourfold.common.recipe.planning.command import plan
from fourfold.common.recipe.rehearsing.command import rehearse
from fourfold.common.recipe.rendering.command import render
from fourfold.common.recipe.run import run
from fourfold.common.recipe.show import show
from fourfold.common.recipe.sizing.command import fit

recipe_app = typer.Typer(no_args_is_help=True, help="Day-zero configurations: check, fit, plan, render, rehearse, run.")


@recipe_app.command("list")
def list_(catalogue: Roots = None, as_json: Json = False) -> None:
    """List all recipes."""
    from rich.table import Table

    from fourfold.common.console import wide_console
    from fourfold.common.recipe.loading import Catalogue

    known = Catalogue(catalogue)
    recipes = [known.recipe(name) for name in known.recipe_paths]
    if as_json:
        rows = [
            {"id": r.id, "title": r.title, "model": r.model, "hardware": r.hardware, "engines": list(r.engines)}
            for r in recipes
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("recipe", "hardware", "engines", "title")
    for r in recipes:
        table.add_row(r.id, r.hardware, ", ".join(r.engines), r.title)
    wide_console().print(table)


@recipe_app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="recipe, model, hardware or prices.")] = "recipe",
) -> None:
    """Print the JSON Schema of a recipe, a model card, a hardware sheet or a price sheet, for editors."""
    from fourfold.common.recipe.json_schema import json_schema

    typer.echo(json.dumps(json_schema(kind), indent=1))


recipe_app.command()(show)
recipe_app.command()(new)
recipe_app.command()(render)
recipe_app.command()(fit)
recipe_app.command()(check)
recipe_app.command()(snapshot)
recipe_app.command()(matrix)
recipe_app.command()(rehearse)
recipe_app.command()(run)
recipe_app.command()(plan)
recipe_app.command("import")(import_)

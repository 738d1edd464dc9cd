"""The ``fourfold`` command. Subcommands import their modules when they run, so ``--help`` needs no torch."""

from __future__ import annotations

import sys

import typer

from fourfold.common import __version__
from fourfold.common.bench.engine import engine
from fourfold.common.bench.linear import linear
from fourfold.common.bench.mtp import mtp as bench_mtp
from fourfold.common.bench.quality import quality
from fourfold.common.bench.quantize import quantize as bench_quantize
from fourfold.common.doctor import doctor
from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.command import mtp_app
from fourfold.common.quant.checkpoint.command import quantize
from fourfold.common.recipe.command import recipe_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench_app = typer.Typer(no_args_is_help=True, help="Measure, as ratios against the alternative in the same run.")
app.command()(quantize)
app.command()(doctor)
app.add_typer(bench_app, name="bench")
app.add_typer(mtp_app, name="mtp")
app.add_typer(recipe_app, name="recipe")
bench_app.command()(linear)
bench_app.command()(engine)
bench_app.command(name="mtp")(bench_mtp)
bench_app.command(name="quantize")(bench_quantize)
bench_app.command()(quality)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"fourfold {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """NVFP4 and the optimisations that compound with it, for vLLM and SGLang."""


def main() -> None:
    """Run the command; a `FourfoldError` becomes one line on stderr and exit status 2."""
    try:
        app()
    except FourfoldError as error:
        typer.echo(f"fourfold: {error}", err=True)
        sys.exit(2)

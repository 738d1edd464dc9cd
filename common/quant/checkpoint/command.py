"""``fourfold quantize``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from fourfold.common.errors import FourfoldError
from fourfold.common.settings import SCALE_METHODS


def quantize(
    model: Annotated[Path, typer.Argument(help="Directory of a model in BF16, FP16, FP32 or FP8 with block scales.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    scales: Annotated[str, typer.Option(help=f"How block scales are chosen: {', '.join(SCALE_METHODS)}.")] = "sweep",
    importance: Annotated[
        str,
        typer.Option(help="What weights the sweep: random (activations of random tokens), a statistics file, or none."),
    ] = "random",
    calibration: Annotated[
        Path | None, typer.Option(help="Text file whose activations weight the sweep, instead of random tokens.")
    ] = None,
    gptq: Annotated[
        bool,
        typer.Option(
            help="Feed rounding errors forward by each layer's Hessian (GPTQ): slower; use text of your domain."
        ),
    ] = False,
    format: Annotated[
        str, typer.Option(help="compressed-tensors, modelopt, or fourfold (served by fourfold without a flag).")
    ] = "compressed-tensors",
    scheme: Annotated[str, typer.Option(help="w4a16, or w4a4 with static input scales.")] = "w4a16",
    ignore: Annotated[
        list[str] | None, typer.Option(help="Regular expression of layer names to leave alone; repeatable.")
    ] = None,
) -> None:
    """Quantise a model to NVFP4 on disk, shard by shard; a run that was killed resumes."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fourfold.common.quant.backends.base import Scheme
    from fourfold.common.quant.checkpoint.convert import Options, convert

    if scheme not in [s.value for s in Scheme]:
        raise FourfoldError(f"--scheme {scheme!r}: expected one of {', '.join(s.value for s in Scheme)}")
    options = Options(scales, importance, calibration, format, Scheme(scheme), tuple(ignore or ()), gptq)
    console = Console(stderr=True)
    columns = TextColumn("{task.percentage:>3.0f}%"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        job = progress.add_task("reading", total=1.0)
        report = convert(model, out, options, lambda text, done: progress.update(job, description=text, completed=done))
    ratio = report.bytes_before / report.bytes_after
    typer.echo(
        f"wrote {out}: {len(report.choice.quantised)} layers in NVFP4 ({scheme}, {format}, scales {scales}), "
        f"{report.bytes_after / 1e6:.0f} MB, {ratio:.2f} times smaller"
    )
    if gptq:
        typer.echo(f"GPTQ error feedback in {report.fed} of them")
    kinds = Counter((name.rpartition(".")[2], reason) for name, reason in report.choice.kept.items())
    for (kind, reason), count in kinds.items():
        typer.echo(f"kept in its dtype: {kind} ({count}): {reason}")
    if report.unseen:
        shown = ", ".join(report.unseen[:3])
        count = len(report.unseen)
        typer.echo(f"{count} layers saw no calibration token and took their siblings' mean, or no weighting: {shown}")

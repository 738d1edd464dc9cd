"""``fourfold bench quantize``: weights a second of each way to choose block scales, compiled against PyTorch."""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated

import typer


def quantize(
    rows: Annotated[int, typer.Option(help="Rows of the BF16 weight.")] = 5632,
    columns: Annotated[int, typer.Option(help="Columns of the weight.")] = 2048,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Speed of the quantiser, compiled and in PyTorch, which take turns."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from fourfold.common.bench import machine
    from fourfold.common.quant.quantizer import quantize_weight

    weight = torch.randn(rows, columns).to(torch.bfloat16)
    sample = weight[: max(1, rows // 16)]
    importance = torch.rand(columns) + 0.01
    table = Table(title=f"quantising {rows}x{columns} BF16 to NVFP4, million weights a second")
    for column in ("scales", "compiled", "PyTorch", "ratio"):
        table.add_column(column, justify="left" if column == "scales" else "right")
    result = []
    for label, method, weighting in (
        ("absmax", "absmax", None),
        ("four_over_six", "four_over_six", None),
        ("sweep", "sweep", None),
        ("sweep, weighted", "sweep", importance),
    ):
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(rounds + 1):
            for compiled, data in ((True, weight), (False, sample)):
                start = time.perf_counter()
                quantize_weight(data, name="weight", method=method, importance=weighting, compiled=compiled)
                if turn:  # the first compiles and warms up
                    speeds[compiled].append(data.numel() / (time.perf_counter() - start) / 1e6)
        fast, slow = statistics.median(speeds[True]), statistics.median(speeds[False])
        result.append({"scales": label, "compiled": fast, "pytorch": slow})
        table.add_row(label, f"{fast:.0f}", f"{slow:.1f}", f"{fast / slow:.1f}")
    if as_json:
        typer.echo(json.dumps({"machine": machine.describe(), "rows": result}, indent=1))
        return
    console = Console()
    console.print(machine.describe())
    console.print(table)

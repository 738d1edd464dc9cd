"""``fourfold bench linear``: one linear layer in NVFP4 against oneDNN's BF16, and against the memory bandwidth.

Every measurement cycles through enough copies of the layer that none stays in a cache, as a model's layers do not.
BF16 and NVFP4 take turns; the ratio is of medians.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.common.errors import FourfoldError

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = ("2560x2048", "2048x2048", "11264x2048", "2048x5632")  # the 1B Llama's projections, fused as engines do
WORKING_SET = 400 << 20  # bytes of BF16 weights to cycle through


@dataclass(frozen=True)
class Timing:
    """Median microseconds of ``x W^T`` for one weight ``[N, K]`` and ``batch`` rows of x."""

    weight: tuple[int, int]
    batch: int
    bf16_us: float
    nvfp4_us: float


def measure(shape: tuple[int, int], batches: Sequence[int], backend: str, scheme: str, rounds: int) -> list[Timing]:
    """Time a layer ``[N, K]`` in BF16 and in NVFP4, turn by turn.

    Raises:
        FourfoldError: the backend is unknown.
    """
    import torch

    from fourfold.common.quant.backends import BACKENDS, Scheme
    from fourfold.common.quant.linear import NvFp4Linear
    from fourfold.common.quant.quantizer import quantize_weight

    if backend not in BACKENDS:
        raise FourfoldError(f"--backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    n, k = shape
    copies = max(2, WORKING_SET // (2 * n * k))
    plain = [torch.randn(n, k).to(torch.bfloat16) for _ in range(copies)]
    library = [_bf16(weight) for weight in plain]
    quantised = [quantize_weight(weight, name=f"{n}x{k}", method="absmax") for weight in plain]
    packed = [BACKENDS[backend].prepare(NvFp4Linear.from_shards([weight]), Scheme(scheme)) for weight in quantised]
    found = []
    for batch in batches:
        x = torch.randn(batch, k).to(torch.bfloat16)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds + 1):  # the first turn warms up
            times[0].append(_seconds(lambda i, x=x: library[i](x), copies))
            times[1].append(_seconds(lambda i, x=x: packed[i](x), copies))
        bf16, nvfp4 = (statistics.median(t[1:]) * 1e6 for t in times)
        found.append(Timing(shape, batch, bf16, nvfp4))
    return found


def linear(
    shape: Annotated[list[str] | None, typer.Option(help="NxK of the weight; repeatable. Default: a 1B Llama.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows of x; repeatable. Default 1, 2, 4, 8, 16, 32, 64, 256.")
    ] = None,
    backend: Annotated[str, typer.Option(help="cpu, cpu_int16 or reference.")] = "cpu",
    scheme: Annotated[str, typer.Option(help="w4a16 or w4a4.")] = "w4a16",
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time of a linear layer in NVFP4 against BF16, with the limit that the memory sets."""
    from rich.console import Console
    from rich.table import Table

    from fourfold.common.bench import machine

    bandwidth = machine.read_bandwidth()
    table = Table(
        title=f"NVFP4 {scheme}, backend {backend}, against oneDNN BF16; memory read at {bandwidth / 1e9:.1f} GB/s"
    )
    for column in ("weight", "batch", "BF16 us", "NVFP4 us", "ratio", "limit us", "share of limit"):
        table.add_column(column, justify="right")
    rows = []
    for size in shape or SHAPES:
        try:
            n, k = (int(part) for part in size.split("x"))
        except ValueError:
            raise FourfoldError(f"--shape {size!r}: expected NxK, such as 2048x5632") from None
        limit = n * k * 9 / 16 / bandwidth * 1e6
        for timing in measure((n, k), batch or (1, 2, 4, 8, 16, 32, 64, 256), backend, scheme, rounds):
            rows.append(asdict(timing) | {"weight": size, "limit_us": limit})
            bf16, nvfp4 = timing.bf16_us, timing.nvfp4_us
            cells = f"{bf16:.0f}", f"{nvfp4:.0f}", f"{bf16 / nvfp4:.2f}", f"{limit:.0f}", f"{limit / nvfp4:.0%}"
            table.add_row(size, str(timing.batch), *cells)
    if as_json:
        typer.echo(json.dumps({"machine": machine.describe(), "bandwidth": bandwidth, "rows": rows}, indent=1))
        return
    console = Console()
    console.print(machine.describe())
    console.print(table)


def _bf16(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with a BF16 weight that engines and compiled models use: oneDNN's, on a weight packed beforehand.

    PyTorch's own where oneDNN has none: it wants AVX-512, or AVX-NE-CONVERT.
    """
    import torch

    from fourfold.common.bench import machine

    if not machine.multiplies_bf16():
        return lambda x: torch.nn.functional.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _seconds(call: Callable[[int], object], copies: int) -> float:
    start = time.perf_counter()
    for index in range(copies):
        call(index)
    return (time.perf_counter() - start) / copies

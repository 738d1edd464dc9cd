"""``fourfold bench engine``: decode speed of the real engine with NVFP4, with BF16 and with a user's other choices.

Every configuration is a server started as a user starts it. All run at the same time, but only one at a time
is awake (the others are stopped by signal), and they take turns, so that a drift of the machine hits all alike.
Decode speed is ``B (T - 1) / (t(T) - t(1))`` for B requests of T tokens; the ratio is of medians.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.common.bench.turns import awake, started
from fourfold.common.errors import FourfoldError
from fourfold.common.serving import EngineServer, installed_engine

if TYPE_CHECKING:
    from rich.table import Table

    from fourfold.common.bench import step

PROMPT_TOKENS = 16


@dataclass
class Row:
    """One line of the table: tokens a second (median and range over the rounds) and the ratio to BF16."""

    configuration: str
    batch: int
    tokens_per_second: float
    low: float
    high: float
    ratio: float | None
    peak_gib: float | None


def _run_batch(server: EngineServer, batch: int, tokens: int, salt: int) -> float:
    """Send ``batch`` requests at once and return the seconds until the last answer."""

    def one(index: int) -> int:
        prompt = [1000 + (salt * 131 + index * 17 + k) % 20000 for k in range(PROMPT_TOKENS)]
        body = {"model": server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return int(server.post("/v1/completions", body)["usage"]["completion_tokens"])

    with ThreadPoolExecutor(batch) as pool:
        start = time.perf_counter()
        produced = list(pool.map(one, range(batch)))
        seconds = time.perf_counter() - start
    if produced != [tokens] * batch:
        raise FourfoldError(f"{server.model}: asked for {tokens} tokens a request, got {produced}")
    return seconds


def decode_speed(server: EngineServer, batch: int, tokens: int, salt: int) -> float:
    """Tokens a second over ``batch`` requests after their first token."""
    first = _run_batch(server, batch, 1, salt)
    whole = _run_batch(server, batch, tokens, salt + 1)
    return batch * (tokens - 1) / (whole - first)


def _peak_gib(server: EngineServer) -> float:
    """Peak resident memory of the largest process of the server, in GiB (the worker that holds the weights)."""
    assert server.process is not None
    peak = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            group = (status.parent / "stat").read_text().rsplit(")", 1)[1].split()[2]
        except OSError:
            continue
        if int(group) == server.process.pid and "VmHWM" in fields:
            peak = max(peak, int(fields["VmHWM"].split()[0]))
    return peak / 2**20


def _engine_args(engine: str, eager: bool, longest: int, batch: int) -> list[str]:
    length = str(longest)
    if engine == "vllm":
        args = ["--dtype", "bfloat16", "--max-model-len", length, "--max-num-batched-tokens", "1024"]
        args += ["--max-num-seqs", str(batch), "--no-enable-prefix-caching"]
        return [*args, "--enforce-eager"] if eager else args
    args = ["--dtype", "bfloat16", "--context-length", length, "--disable-radix-cache"]
    return [*args, "--max-total-tokens", str(longest * batch), "--max-running-requests", str(batch)]


def measure(
    servers: dict[str, EngineServer], batches: list[int], tokens: int, rounds: int, note: Any = lambda text: None
) -> list[Row]:
    """Start every server, let them take turns, and return the rows; the first server is the base of the ratios."""
    speeds: dict[tuple[str, int], list[float]] = {}
    with started(servers, lambda server: _run_batch(server, max(batches), 4, 0), note):
        for turn in range(rounds):
            for batch in batches:
                for label, server in servers.items():
                    note(f"round {turn + 1} of {rounds}: {label}, batch {batch}")
                    with awake(server):
                        speed = decode_speed(server, batch, tokens, 10 * turn + batch)
                    speeds.setdefault((label, batch), []).append(speed)
        peaks = {label: _peak_gib(server) for label, server in servers.items()}
    base = next(iter(servers))
    return [
        Row(
            label,
            batch,
            statistics.median(values),
            min(values),
            max(values),
            statistics.median(values) / statistics.median(speeds[base, batch]),
            peaks[label],
        )
        for (label, batch), values in sorted(
            speeds.items(), key=lambda item: (item[0][1], list(servers).index(item[0][0]))
        )
    ]


def _steps(rows: list[Row], parts: list[step.Parts], ours: str) -> Table:
    """The table of where a step's time goes, in BF16 and in NVFP4."""
    from rich.table import Table

    table = Table(title="milliseconds of a decoding step; layers and head as timed alone")
    for column in ("batch", "configuration", "step", "linear layers", "head", "rest of the engine"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    speeds = {(row.configuration, row.batch): row.tokens_per_second for row in rows}
    for part in parts:
        for label, layers in (("BF16", part.layers_bf16), (ours, part.layers_nvfp4)):
            whole = 1e3 * part.batch / speeds[label, part.batch]
            cells = (whole, layers, part.head, whole - layers - part.head)
            table.add_row(str(part.batch), label, *(f"{cell:.1f}" for cell in cells))
    return table


def engine(
    model: Annotated[
        str, typer.Argument(help="Model directory, 'smollm2' or '1b' (random weights, Llama shape).")
    ] = "1b",
    batch: Annotated[list[int] | None, typer.Option(help="Concurrent requests; repeatable. Default 1, 8, 32.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens generated a request.")] = 64,
    rounds: Annotated[int, typer.Option(help="Turns of each configuration.")] = 3,
    scheme: Annotated[str, typer.Option(help="w4a16 or w4a4.")] = "w4a16",
    int4: Annotated[bool, typer.Option(help="Add the engine's own INT4 (compressed-tensors, group 128).")] = True,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="Folder with llama.cpp's llama-batched-bench, llama-quantize and convert_hf_to_gguf.py."),
    ] = None,
    eager: Annotated[bool, typer.Option(help="vLLM: run without compilation.")] = False,
    logs: Annotated[Path | None, typer.Option(help="Folder for the servers' logs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decode speed in the real engine: NVFP4 against BF16, the engine's INT4 and llama.cpp, in turns."""
    from rich.console import Console
    from rich.table import Table

    from fourfold.common.bench import machine, peers, step
    from fourfold.common.demo.model import resolve

    batches = batch or [1, 8, 32]
    name, version = installed_engine()
    path = resolve(model)
    console = Console(stderr=True)
    logs = logs or Path(tempfile.mkdtemp(prefix="fourfold-bench-"))
    arguments = _engine_args(name, eager, PROMPT_TOKENS + tokens + 16, max(batches))
    quant = {"quant": {"scheme": scheme}}
    ours = ["--quantization", "fourfold_nvfp4"]
    ours_env = {"FOURFOLD_CONFIG": json.dumps(quant)} if name == "sglang" else {}
    if name == "vllm":
        ours += ["--additional-config", json.dumps({"fourfold": quant})]
    servers = {
        "BF16": EngineServer(name, str(path), logs / "bf16.log", arguments),
        f"fourfold {scheme}": EngineServer(name, str(path), logs / "fourfold.log", [*arguments, *ours], ours_env),
    }
    skipped: list[str] = []
    if int4 and name == "vllm":
        try:
            packed = peers.int4_checkpoint(path)
            servers["INT4 g128"] = EngineServer(name, str(packed), logs / "int4.log", arguments)
        except FourfoldError as error:
            skipped.append(f"INT4: {error}")
    with console.status("starting") as status:
        rows = measure(servers, batches, tokens, rounds, status.update)
        if llama_cpp is not None:
            for kind in peers.LLAMA_KINDS:
                status.update(f"llama.cpp {kind}")
                try:
                    speeds = peers.llama_cpp_speed(llama_cpp, path, kind, batches, tokens)
                except FourfoldError as error:  # the rows above took minutes and are not lost
                    skipped.append(f"llama.cpp {kind}: {error}")
                    continue
                for size, speed in speeds.items():
                    base = next(row for row in rows if row.batch == size)
                    ratio = speed / base.tokens_per_second
                    rows.append(Row(f"llama.cpp {kind}", size, speed, speed, speed, ratio, None))
        else:
            skipped.append("llama.cpp: give its tools with --llama-cpp")
        bandwidth = machine.read_bandwidth()
        status.update("the linear layers alone")
        parts = step.parts(path, batches, scheme)
    weights = step.bytes_per_token(path)
    if as_json:
        result = {"machine": machine.describe(), "engine": [name, version], "model": model, "tokens": tokens}
        result |= {"bandwidth": bandwidth, "bytes_per_token": weights, "rows": [asdict(r) for r in rows]}
        result["parts"] = [asdict(part) for part in parts]
        typer.echo(json.dumps(result, indent=1))
        return
    table = Table(title=f"{name} {version}, {model}, decode tokens/s, {tokens} tokens, {rounds} rounds")
    for column in ("batch", "configuration", "tokens/s", "range", "ratio to BF16", "peak GiB"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for row in sorted(rows, key=lambda r: r.batch):
        peak = "" if row.peak_gib is None else f"{row.peak_gib:.2f}"
        spread = f"{row.low:.1f} to {row.high:.1f}"
        speed = f"{row.tokens_per_second:.1f}"
        table.add_row(str(row.batch), row.configuration, speed, spread, f"{row.ratio:.2f}", peak)
    out = Console()
    out.print(machine.describe())
    out.print(table)
    out.print(_steps(rows, parts, f"fourfold {scheme}"))
    for label, size in weights.items():
        limit = f"{bandwidth / size:.1f} tokens/s at batch 1"
        out.print(f"{label}: {size / 1e6:.0f} MB of weights a token; at {bandwidth / 1e9:.1f} GB/s read: {limit}")
    for reason in skipped:
        out.print(f"not measured: {reason}")

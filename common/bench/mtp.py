"""``fourfold bench mtp``: decode speed of the real engine with drafts of an MTP head, in BF16 and in NVFP4.

Every configuration is a server of this environment's engine, started as a user starts it. As many as fit in memory run
at the same time and take turns, always with the one that does not speculate among them: ratios are within a turn.
Prompts are read into the prefix cache before the clock runs; `flow` keeps the batch full while it does.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.common.bench import flow, machine
from fourfold.common.bench.mtp_plan import Configuration, Plan
from fourfold.common.bench.mtp_rows import (
    ADAPTIVE,
    ENGINE,
    HYBRID,
    MIXED,
    NONE,
    STOCK,
    WEIGHTS,
    Derived,
    Row,
    Turn,
    complete,
    derive,
    fixed,
    rows,
    target_of,
)
from fourfold.common.bench.prompts import PROMPTS
from fourfold.common.bench.turns import awake, started
from fourfold.common.console import wide_console
from fourfold.common.errors import FourfoldError
from fourfold.common.serving import EngineServer, installed_engine

if TYPE_CHECKING:
    from rich.table import Table

LEAST_MEMORY = 2 * 2**30  # bytes left with all servers started; they still grow, and Linux drops code it needs again


def configurations(
    weights: Sequence[str], lengths: Sequence[int], only: Sequence[str], stock: bool = False, engine: str = "vllm"
) -> list[Configuration]:
    """What ``only`` (regular expressions of labels) leaves of all configurations, and no speculation for each target.

    Args:
        stock: and vLLM in BF16 without fourfold.

    Raises:
        FourfoldError: nothing is left to compare, or not with ``stock``.
    """
    found, learned = [], [ENGINE] * (engine == "sglang") + [ADAPTIVE, HYBRID]
    for kind in weights:
        names = [fixed(k) for k in lengths] + ([] if kind == MIXED else learned)
        chosen = [Configuration(kind, name) for name in names]
        found += [c for c in chosen if not only or any(re.search(pattern, c.label) for pattern in only)]
    if not found:
        raise FourfoldError(
            f"--only {' '.join(only)}: no configuration has such a label; they are a --weights and k=1, ..., "
            f"{', '.join(learned[:-1])} or {HYBRID}, as in 'nvfp4 k=2'"
        )
    bases = [Configuration(target, NONE) for target in dict.fromkeys(target_of(c.weights) for c in found)]
    if stock and Configuration("bf16", NONE) not in bases:
        raise FourfoldError("--stock: vLLM without fourfold serves BF16, and nothing that is left has a target in BF16")
    return bases + [Configuration("bf16", STOCK)] * stock + found


def groups(found: Sequence[Configuration], alive: int) -> list[list[Configuration]]:
    """Split into groups of at most ``alive`` servers, each with those without speculation that its others need."""
    if len(found) <= alive:
        return [list(found)]
    out = []
    for base in (c for c in found if c.name == NONE):
        others = [c for c in found if c.name != NONE and target_of(c.weights) == base.weights]
        out += [[base, *others[i : i + alive - 1]] for i in range(0, len(others), alive - 1)]
    return out


def measure(
    plan: Plan, group: Mapping[Configuration, EngineServer], first: int, note: Callable[[str], Any]
) -> Iterator[Turn]:
    """Let the servers of one group take turns; ``first`` is the number of the first turn."""

    def take(kind: str, batch: int, start: int, count: int, configuration: Configuration) -> flow.Flow:
        texts = [PROMPTS[kind][(start + i) % len(PROMPTS[kind])] for i in range(count)]
        with awake(group[configuration]):
            return flow.run(group[configuration], texts, batch, plan.tokens)

    servers = {configuration.label: server for configuration, server in group.items()}
    with started(servers, lambda server: flow.read(server, plan.prompts(), max(plan.batches)), note):
        left = machine.available_memory()
        if left < LEAST_MEMORY:
            raise FourfoldError(
                f"{len(servers)} servers leave {left / 2**30:.1f} GiB of memory, too little to measure undisturbed; "
                f"expected {LEAST_MEMORY / 2**30:.0f} GiB or more; start fewer at once with --alive, or leave some out"
            )
        for kind in plan.kinds:
            for batch in plan.batches:
                count = plan.count(batch)
                for configuration in group:  # the kernels and the learned length get to know this batch
                    note(f"{kind}, batch {batch}: warming {configuration.label}")
                    take(kind, batch, 0, batch, configuration)
                for turn in range(plan.rounds):
                    for configuration in group:
                        note(f"{kind}, batch {batch}, round {turn + 1} of {plan.rounds}: {configuration.label}")
                        result = take(kind, batch, turn * count, count, configuration)
                        weights, name = configuration.weights, configuration.name
                        yield Turn(weights, name, kind, batch, first + turn, result)


def draft_directory(head: Path, scratch: Path, engine: str = "vllm") -> Path:
    """``head`` where it is a draft directory, else one of it for ``engine`` below ``scratch``."""
    from fourfold.common.mtp.extract import extract
    from fourfold.common.mtp.head import KEY

    try:
        if KEY in json.loads((head / "config.json").read_text()):
            return head.resolve()
    except (OSError, ValueError) as error:
        raise FourfoldError(f"--head {head}: expected the directory of a model with an MTP head: {error}") from None
    extract(head, scratch / "draft", engine)
    return scratch / "draft"


def _check(option: str, given: Sequence[Any], allowed: Sequence[Any]) -> None:
    for value in given:
        if value not in allowed:
            raise FourfoldError(f"{option} {value}: expected {', '.join(map(str, allowed))}")


def mtp(
    model: Annotated[str, typer.Argument(help="Model directory or 'smollm2'.")] = "smollm2",
    head: Annotated[
        Path | None,
        typer.Option(
            help="Model with an MTP head, or its draft directory. Default: the model's own; for smollm2 ours."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Requests in flight; repeatable. Default 1, 4, 16, 32.")
    ] = None,
    prompts: Annotated[list[str] | None, typer.Option(help="chat, edit; repeatable. Default both.")] = None,
    k: Annotated[list[int] | None, typer.Option(help="Fixed draft length; repeatable. Default 1 to 4.")] = None,
    weights: Annotated[list[str] | None, typer.Option(help=f"{', '.join(WEIGHTS)}; repeatable. Default all.")] = None,
    tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    rounds: Annotated[int, typer.Option(help="Turns of each configuration.")] = 3,
    requests: Annotated[
        int | None, typer.Option(help="Requests a turn beyond those in flight. Default as many, 7 at least.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Hybrid: longest draft from the request's own text.")] = 8,
    head_tokens: Annotated[int, typer.Option(help="Hybrid: draft of the head where the text has none.")] = 2,
    only: Annotated[
        list[str] | None, typer.Option(help="Regular expression of labels such as 'bf16 k=2'; repeatable.")
    ] = None,
    alive: Annotated[int, typer.Option(help="Servers in memory at once, 2 to 3 GiB each for smollm2.")] = 5,
    stock: Annotated[bool, typer.Option(help="Also vLLM in BF16 without fourfold, which does not speculate.")] = False,
    eager: Annotated[bool, typer.Option(help="Run vLLM without compilation.")] = False,
    logs: Annotated[Path | None, typer.Option(help="Folder for the servers' logs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decode speed and acceptance with an MTP head: none, fixed, learned and hybrid drafts, in turns."""
    from rich.console import Console

    from fourfold.common.demo.model import SMOLLM2_HEAD, resolve

    kinds, given = prompts or list(PROMPTS), weights or list(WEIGHTS)
    _check("--prompts", kinds, list(PROMPTS))
    _check("--weights", given, WEIGHTS)
    batches, lengths = sorted(set(batch or [1, 4, 16, 32])), sorted(set(k or [1, 2, 3, 4]))
    least = {"--batch": batches[0], "--k": lengths[0], "--rounds": rounds, "--tokens": tokens}
    least |= {"--text-tokens": text_tokens, "--head-tokens": head_tokens}
    for option, value in {**least, "--requests": 1 if requests is None else requests}.items():
        if value < 1:
            raise FourfoldError(f"{option} {value}: expected 1 or more")
    if alive < 2:
        raise FourfoldError(f"--alive {alive}: expected 2 or more, since one of the servers does not speculate")
    name, version = installed_engine()
    if name == "sglang" and (stock or eager):
        raise FourfoldError(
            f"--{'stock' if stock else 'eager'} is for vLLM: on a CPU SGLang needs fourfold's platform, and compiles "
            "nothing; leave it out"
        )
    chosen = configurations(given, lengths, only or [], stock, name)
    path = resolve(model)
    chosen_head = head or (SMOLLM2_HEAD if model == "smollm2" else path)
    folder = logs or Path(tempfile.mkdtemp(prefix="fourfold-bench-"))
    console, turns, early = Console(stderr=True), [], False
    with tempfile.TemporaryDirectory(prefix="fourfold-draft-") as scratch, console.status("starting") as status:
        draft = draft_directory(chosen_head, Path(scratch), name)
        plan = Plan(
            name, path, draft, batches, kinds, lengths, (text_tokens, head_tokens), tokens, rounds, requests, eager
        )
        try:
            for i, group in enumerate(groups(chosen, alive)):
                logs_of = {c: folder / f"{i} {c.label}.log".replace(" ", "-") for c in group}
                servers = {
                    c: EngineServer(name, str(path), log, plan.arguments(c), plan.environment(c))
                    for c, log in logs_of.items()
                }
                for turn in measure(plan, servers, i * rounds, status.update):
                    turns.append(turn)
        except (KeyboardInterrupt, SystemExit):
            early = True  # an hour's turns are worth a table
            console.print(f"ended early, after {len(turns)} turns")
        except (FourfoldError, OSError) as error:
            if not turns:
                raise
            early = True
            console.print(f"ended early, after {len(turns)} turns: {error}", markup=False)
    table = rows(complete(turns))
    derived = derive(table)
    if not table:
        raise FourfoldError("ended before the first configuration could be compared with none")
    if as_json:
        result: dict[str, Any] = {"machine": machine.describe(), "engine": [name, version], "model": model}
        result |= {"head": str(chosen_head), "tokens": tokens, "rounds": rounds}
        result |= {"rows": [asdict(row) for row in table], "derived": [asdict(item) for item in derived]}
        typer.echo(json.dumps(result, indent=1))
        raise typer.Exit(early)
    out = wide_console()
    out.print(machine.describe())
    out.print(_table(table, f"{name} {version}, {model}, tokens/s, answers up to {tokens} tokens, {rounds} rounds"))
    out.print(_derived(derived))
    raise typer.Exit(early)


def _table(table: Sequence[Row], title: str) -> Table:
    from rich.table import Table

    out = Table(title=title)
    left = ("prompts", "weights", "drafts")
    for column in ("prompts", "batch", "weights", "drafts", "tokens/s", "range", "ratio", "length", "accepted, %"):
        out.add_column(column, justify="left" if column in left else "right")
    for row in table:
        length = "" if row.length is None else f"{row.length:.2f}"
        accepted = " ".join(f"{100 * share:.0f}" for share in row.acceptance)
        speed, spread = f"{row.tokens_per_second:.1f}", f"{row.low:.1f} to {row.high:.1f}"
        cells = (row.prompts, str(row.batch), row.weights, row.configuration, speed, spread, f"{row.ratio:.2f}")
        out.add_row(*cells, length, accepted)
    return out


def _derived(derived: Sequence[Derived]) -> Table:
    from rich.table import Table

    out = Table(title="what follows: ratios of ratios; the last column is a difference of acceptance lengths")
    columns = (
        "best fixed",
        "adaptive / best or none",
        "hybrid / best fixed",
        "together / product",
        "NVFP4 - BF16 head",
    )
    for column in ("prompts", "batch", "weights", *columns):
        out.add_column(column, justify="right" if column in columns or column == "batch" else "left")
    for item in derived:
        values = (item.adaptive, item.hybrid, item.compounding, item.head_acceptance)
        best = "" if item.best is None else f"{item.best} ({item.best_ratio:.2f})"
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        out.add_row(item.prompts, str(item.batch), item.weights, best, *cells)
    return out

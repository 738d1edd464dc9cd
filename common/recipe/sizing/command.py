"""``fourfold recipe fit``: whether a recipe fits the memory of its hardware, by arithmetic alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.common.console import wide_console
from fourfold.common.recipe.options import Roots

if TYPE_CHECKING:
    from rich.console import Console

    from fourfold.common.recipe.sizing.fit import Fit


def fit(
    recipe: Annotated[str, typer.Argument(help="Id of a recipe, or the path of its file.")],
    engine: Annotated[str | None, typer.Option(help="vllm or sglang; default: each that the recipe is for.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Another hardware sheet than the recipe's.")] = None,
    catalogue: Roots = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; sizes are bytes.")] = False,
) -> None:
    """Say whether a recipe fits the memory of its GPUs: weights by part, reserves, KV cache, and what to change.

    Computed from the model's config.json; GB are 10^9 bytes, GiB 2^30. Exits with 1 where a role does not fit.
    """
    from fourfold.common.errors import FourfoldError
    from fourfold.common.recipe.launch import engine_of
    from fourfold.common.recipe.loading import Catalogue
    from fourfold.common.recipe.sizing.fit import cases_of, gb, with_advice
    from fourfold.common.recipe.sizing.traits import read_config, read_traits

    known = Catalogue(catalogue)
    found = known.recipe(recipe)
    if engine is not None:
        if engine not in ("vllm", "sglang"):
            raise FourfoldError(f"--engine {engine}: expected vllm or sglang")
        engine_of(found, engine)
    card, sheet = known.model(found.model), known.hardware(hardware or found.hardware, "--hardware")
    path = known.model_path(found.model).parent / card.config
    traits = read_traits(read_config(path), str(path))
    drafts = {draft.repo: (draft, known.config(draft.id)) for draft in known.draft_models()}
    results = [
        with_advice(case)
        for name in ([engine] if engine else found.engines)
        for case in cases_of(found, name, card, traits, sheet, drafts)
    ]
    if as_json:
        facts = {"recipe": found.id, "model": card.id, "hardware": sheet.id}
        typer.echo(json.dumps({**facts, "roles": [as_facts(fit) for fit in results]}, indent=1))
    else:
        console = wide_console()
        console.print(f"{found.id}: {card.repo} on {sheet.gpu}, {gb(sheet.memory_bytes)} each", highlight=False)
        for fit in results:
            _show(console, fit)
    if any(fit.verdict == "does not fit" for fit in results):
        raise typer.Exit(1)


def as_facts(fit: Fit) -> dict[str, Any]:
    """The result as JSON; sizes are bytes of one rank."""
    case, space = fit.case, fit.space
    return {
        "engine": case.options.engine,
        "role": case.role,
        "replicas": case.replicas,
        "parallel": case.parallel.model_dump(),
        "weights": [vars(part) for part in case.parts],
        "weights_placed": fit.placed,
        "layout_factor": fit.factor,
        "weights_bytes": space.weights,
        "reserves": [vars(reserve) for reserve in case.reserves],
        "budget_bytes": fit.budget,
        "cache": {
            "bytes": space.cache,
            "per_token": case.cache.per_token,
            "per_sequence": case.cache.per_sequence,
            "per_batched_token": case.cache.per_batched_token,
            "in_flight_tokens": case.options.in_flight,
            "sequence_bytes": case.cache.sequence(case.length, 1 + case.options.draft_tokens),
        },
        "sequence_tokens": case.length,
        "sequences": space.sequences,
        "tokens": space.tokens,
        "wanted_sequences": case.wanted,
        "verdict": fit.verdict,
        "reasons": list(fit.reasons),
        "advice": list(fit.advice),
        "notes": list(case.notes),
    }


def _show(console: Console, fit: Fit) -> None:
    from rich.table import Table

    from fourfold.common.recipe.sizing.fit import gb

    case, space = fit.case, fit.space
    table = Table(
        "part", "format", "on each rank", "GB", "GiB", title=f"{case.options.engine} {case.role}: {_layout(fit)}"
    )
    for column in table.columns[3:]:
        column.justify = "right"
    for part in sorted(case.parts, key=lambda part: -part.bytes):
        if part.bytes >= 5e6 or len(case.parts) < 8:
            table.add_row(part.part, part.format, "whole" if part.copied else "its share", *_pair(part.bytes))
    if fit.factor != 1:
        table.add_row("padded layouts", "", f"factor {fit.factor:.3f}, calibrated", *_pair(space.weights - fit.placed))
    table.add_row("weights", "", "", *_pair(space.weights), end_section=True)
    for reserve in case.reserves:
        table.add_row(reserve.what, "", "allowance" if reserve.allowance else "at most", *_pair(reserve.bytes))
    used = f"{case.options.utilisation:g} of {case.sheet.gpu}" if case.sheet.compute_capability else "the machine"
    table.add_row("budget", "", used, *_pair(fit.budget))
    table.add_row("left for the KV cache", "", "", *_pair(space.cache))
    console.print(table)
    per_token = ", ".join(f"{name} {size:,.0f}" for name, size in case.cache.per_token.items()) or "nothing"
    console.print(f"KV cache of a token: {case.cache.token_bytes:,.0f} bytes ({per_token})", highlight=False)
    if case.cache.sequence_bytes:
        fixed = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in case.cache.per_sequence.items())
        console.print(f"state of a sequence: {fixed}", highlight=False)
    if case.options.engine == "vllm" and case.cache.in_flight(case.options.in_flight, case.options.max_length):
        state = case.cache.in_flight(case.options.in_flight, case.options.max_length)
        console.print(f"state of {case.options.in_flight} tokens in flight: {gb(state)}", highlight=False)
    console.print(
        f"holds {space.sequences} sequences of {case.length} tokens a rank ({space.tokens:,} tokens); "
        f"the workload wants {case.wanted}",
        highlight=False,
    )
    if case.options.engine == "vllm" and space.cache > 0:
        one = case.cache.sequence(case.options.max_length, case.options.in_flight)
        text = f"vLLM's own log would say: concurrency {space.cache / one:.2f}x for {case.options.max_length} tokens"
        console.print(text, highlight=False)
    console.print(f"verdict: {fit.verdict}", style="bold", highlight=False)
    for line in fit.reasons:
        console.print(f"  because {line}", highlight=False)
    for line in case.notes:
        console.print(f"  note: {line}", highlight=False)
    for line in fit.advice:
        console.print(f"  try {line}", highlight=False)


def _layout(fit: Fit) -> str:
    p = fit.case.parallel
    words = [f"{name} {size}" for name, size in p.model_dump().items() if size > 1] or ["1 GPU"]
    return f"{fit.case.replicas} x {p.world} GPUs ({', '.join(words)})"


def _pair(size: float) -> tuple[str, str]:
    return f"{size / 1e9:.2f}", f"{size / 2**30:.2f}"

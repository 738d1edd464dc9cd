"""``fourfold recipe show``: all that a recipe says, with sources, and the command lines that follow from it."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.common.recipe.options import Json, Roots

if TYPE_CHECKING:
    from fourfold.common.recipe.launch import Start
    from fourfold.common.recipe.loading import Catalogue
    from fourfold.common.recipe.schema import Evidence, HardwareSheet, ModelCard, Recipe, Role, Source

HEAD = "HEAD_ADDRESS"  # of a replica's first node, which the recipe cannot know
WIDTH = 110


def show(
    recipe: Annotated[str, typer.Argument(help="Recipe id (see `fourfold recipe list`) or the path of its file.")],
    engine: Annotated[str | None, typer.Option(help="Only this engine: vllm or sglang.")] = None,
    catalogue: Roots = None,
    as_json: Json = False,
) -> None:
    """Show a recipe: model, machine, workload, the command line of each role, evidence, known issues and sources.

    Starts nothing. Exit status 2: the recipe is not valid, or not for that engine.
    """
    from fourfold.common.recipe.launch import engine_of
    from fourfold.common.recipe.loading import Catalogue

    known = Catalogue(catalogue)
    found = known.recipe(recipe)
    if engine is not None:
        engine_of(found, engine)
    shown = {name: commands(found, name, known) for name in found.engines if engine in (None, name)}
    if as_json:
        data = found.model_dump(mode="json", by_alias=True, exclude_none=True)
        data["file"] = str(known.find(recipe))
        data["starts"] = {name: [_start(start) for start in starts] for name, starts in shown.items()}
        typer.echo(json.dumps(data, indent=1))
    else:
        typer.echo("\n".join(lines(found, known, shown)))


def commands(recipe: Recipe, engine: str, known: Catalogue) -> list[Start]:
    """What starts the first replica of each role, a node each."""
    from fourfold.common.recipe.launch import Place, starts

    card, sheet = known.model(recipe.model), known.hardware(recipe.hardware)
    return [start for start in starts(recipe, engine, card, sheet, Place(head=HEAD)) if start.replica == 0]


def _start(start: Start) -> dict[str, Any]:
    return {
        "role": start.role,
        "node": start.node,
        "nodes": start.nodes,
        "gpus": start.gpus,
        "command": start.command,
        "env": dict(start.env),
    }


def lines(recipe: Recipe, known: Catalogue, shown: dict[str, list[Start]]) -> Iterator[str]:
    """The text."""
    card, sheet = known.model(recipe.model), known.hardware(recipe.hardware)
    yield f"{recipe.id}: {recipe.title}"
    yield from _pairs(_facts(recipe, card, sheet))
    for engine, starts in shown.items():
        yield from _engine(recipe, engine, starts)
    if recipe.evidence:
        yield "\nEvidence"
        for evidence in recipe.evidence:
            yield from _item(_evidence(evidence))
    if recipe.known_issues:
        yield "\nKnown issues"
        for issue in recipe.known_issues:
            todo = f" Workaround: {issue.workaround}" if issue.workaround else ""
            yield from _item(f"{issue.id}: {issue.what}{todo} [{_source(issue.source)}]")
    if recipe.rehearsal:
        yield "\nRehearsal on a CPU"
        if recipe.rehearsal.proxy:
            yield from _item(f"{recipe.rehearsal.proxy} stands in for the model")
        for option, value in recipe.rehearsal.substitutions.items():
            yield from _item(f"{option}: {'left out' if value is None else json.dumps(value)}")
        if recipe.rehearsal.reason:
            yield from _item(recipe.rehearsal.reason)
    if recipe.notes:
        yield "\nNotes"
        for note in recipe.notes:
            yield from _item(note)
    yield "\nSources"
    for source in dict.fromkeys(_source(s) for s in [*card.sources, card.config_source, *sheet.sources]):
        yield from _item(source)


def _facts(recipe: Recipe, card: ModelCard, sheet: HardwareSheet) -> Iterator[tuple[str, str]]:
    from fourfold.common.recipe.sizing.fit import gb

    formats = ", ".join(f"{part} {dtype}" for part, dtype in card.formats.items())
    sizes = f"{card.total_parameters:g} B parameters, {card.active_parameters:g} B active"
    size = f", {card.published_bytes / 1e9:.1f} GB" if card.published_bytes else ""
    yield "model", f"{card.repo} ({card.license}): {sizes}{size}; {formats}"
    yield (
        "hardware",
        f"{sheet.id}: {sheet.gpu}, {sheet.gpus_per_node} a node, NVLink joins {sheet.nvlink_domain}, "
        f"{gb(sheet.memory_bytes)} each",
    )
    work = recipe.workload
    many = f", {work.concurrency} at once" if work.concurrency else ""
    yield "workload", f"{work.kind}: {work.input_tokens} tokens in, {work.output_tokens} out{many}"
    if work.slo.tokens_per_second_user is not None:
        yield "service level", f"{work.slo.tokens_per_second_user:g} tokens/s for each user"
    if work.slo.ttft_seconds is not None:
        yield "service level", f"first token within {work.slo.ttft_seconds:g} s"
    yield "speculation", "\n".join(_speculation(recipe))
    if recipe.extends:
        yield "extends", recipe.extends


def _speculation(recipe: Recipe) -> Iterator[str]:
    spec = recipe.speculation
    if spec is None:
        yield "none"
        return
    yield f"{spec.method}, {spec.tokens} tokens a step" + (
        f", drafts of {spec.draft_model}" if spec.draft_model else ""
    )
    if spec.acceptance is None:
        yield "expected acceptance: nothing published is known"
        return
    accept = spec.acceptance
    mode = f", {accept.mode}" if accept.mode else ""
    simulated = "; SIMULATED, not measured" if accept.synthetic else ""
    where = f"{accept.dataset}{mode}{simulated} [{_source(accept.source)}]"
    yield f"expected acceptance length {accept.length:g} on {where}"


def _engine(recipe: Recipe, engine: str, starts: list[Start]) -> Iterator[str]:
    from fourfold.common.recipe.launch import engine_of

    plan = engine_of(recipe, engine)
    gpus = sum(role.replicas * role.parallel.world for role in plan.roles.values())
    yield f"\n{engine} {plan.versions}: {gpus} GPU{'s' * (gpus > 1)} in all"
    router = f"{plan.router.kind} {json.dumps(plan.router.args) if plan.router.args else ''}" if plan.router else None
    stock = "off: the stock engine" if plan.fourfold is None else plan.fourfold.model_dump_json(exclude_unset=True)
    yield from _pairs([("image", plan.image), ("router", router), ("fourfold", stock)])
    for name, role in plan.roles.items():
        mine = [start for start in starts if start.role == name]
        yield from _role(name, role, mine)


def _role(name: str, role: Role, starts: list[Start]) -> Iterator[str]:
    sizes = {key: size for key, size in role.parallel.model_dump().items() if size > 1}
    ranks = ", ".join(f"{key} {size}" for key, size in sizes.items()) or "one rank"
    first = starts[0]
    nodes = f"{first.nodes} node{'s' * (first.nodes > 1)} x {first.gpus} GPU{'s' * (first.gpus > 1)}"
    yield f"  {name}: {role.replicas} replica{'s' * (role.replicas > 1)} of {nodes} ({ranks})"
    for key, value in first.env.items():
        yield f"    {key}={shlex.quote(value)}"
    yield textwrap.indent(command_text(first.command), "    ")
    for start in starts[1:]:
        yield f"    node {start.node}: {_difference(first, start)}"


def command_text(command: list[str]) -> str:
    """A command line for a shell, an option a line."""
    rows: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--"):
            rows.append([])
        rows[-1].append(word)
    return " \\\n  ".join(shlex.join(row) for row in rows)


def _difference(first: Start, other: Start) -> str:
    """How the command line of another node differs."""
    changed = {k: v for k, v in other.options.items() if first.options.get(k) != v}
    gone = [f"without --{key}" for key in first.options if key not in other.options]
    set_ = [f"--{key}" if value is True else f"--{key} {value}" for key, value in changed.items()]
    return ", ".join([*set_, *gone]) or "the same"


def _evidence(evidence: Evidence) -> str:
    text = f"{evidence.metric.replace('_', ' ')} {evidence.value:g}: {evidence.at}"
    if evidence.engine:
        text += f"; {evidence.engine}"
    if evidence.prices:
        text += f"; prices {evidence.prices}"
    if evidence.synthetic_acceptance:
        text += "; SIMULATED acceptance of drafts"
    if evidence.mixes:
        text += f"; MIXES the gains of {', '.join(evidence.mixes)}"
    return f"{text} [{_source(evidence.source)}]"


def _source(source: Source) -> str:
    return ", ".join(str(part) for part in (source.what, source.date, source.url) if part)


def _pairs(pairs: Any) -> Iterator[str]:
    for key, value in pairs:
        if value is not None:
            yield from (
                textwrap.wrap(
                    value,
                    WIDTH,
                    initial_indent=f"  {key + ':':14s}",
                    subsequent_indent=" " * 16,
                    break_long_words=False,
                )
                if "\n" not in value
                else [f"  {key + ':':14s}" + value.replace("\n", "\n" + " " * 16)]
            )


def _item(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )

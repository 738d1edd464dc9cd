"""``fourfold recipe plan``: which layout to try first, and how far to believe it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.common.console import wide_console
from fourfold.common.recipe.options import Roots

if TYPE_CHECKING:
    from rich.console import Console

    from fourfold.common.recipe.loading import Catalogue
    from fourfold.common.recipe.planning.calibrate import Residual
    from fourfold.common.recipe.planning.planner import Plan, Point, Subject


def plan(
    model: Annotated[str, typer.Argument(help="Model card, or the path of a config.json.")],
    hardware: Annotated[str, typer.Option(help="Hardware sheet, such as gb300-nvl72.")],
    engine: Annotated[str, typer.Option(help="vllm or sglang: whose memory is accounted.")] = "vllm",
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a request's input.")] = 8192,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of its answer.")] = 1024,
    slo_tokens_per_second_user: Annotated[
        float | None, typer.Option(help="Only deployments in which a user gets at least so many tokens a second.")
    ] = None,
    ttft: Annotated[
        float | None, typer.Option(help="Only those with at most so many seconds to a first token.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Most GPUs; default: one NVLink domain.")] = None,
    acceptance: Annotated[
        str | None,
        typer.Option(help="Mean acceptance length with 1, 2, ... draft tokens, such as 1.8,2.3; none: no speculation."),
    ] = None,
    prices: Annotated[str | None, typer.Option(help="Price sheet; without one no cost is printed.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a PNG; needs matplotlib.")] = None,
    cross_check: Annotated[
        bool, typer.Option("--cross-check", help="Also predict each published figure from the others alone.")
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 16,
    catalogue: Roots = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every point of the front.")] = False,
) -> None:
    """Rank layouts by tokens a second for each GPU against tokens a second for each user.

    An analytic roofline with three constants from published figures; it predicts and does not measure. Layouts that do
    not fit in memory are left out. Exits with 1 where nothing fits or keeps to the service level.
    """
    from fourfold.common.errors import FourfoldError
    from fourfold.common.recipe.loading import Catalogue
    from fourfold.common.recipe.planning.calibrate import calibrate, left_out, residuals
    from fourfold.common.recipe.planning.planner import plan as make
    from fourfold.common.recipe.planning.plot import png_plot, text_plot

    if engine not in ("vllm", "sglang"):
        raise FourfoldError(f"--engine {engine}: expected vllm or sglang")
    known = Catalogue(catalogue)
    subject = _subject(known, model, hardware, engine, input_tokens, output_tokens, gpus, acceptance)
    price = _price(known, prices, hardware)
    by = calibrate()
    found, errors = make(subject, by, slo_tokens_per_second_user, ttft), residuals(by)
    published = [r for r in errors if r.anchor.total and r.anchor.per_user and _same(r, subject)]
    series = {
        "predicted": [(p.per_user, p.total) for p in found.front],
        "published": [(r.anchor.per_user, r.anchor.total) for r in published],
    }
    if plot is not None:
        png_plot(series, plot, f"{subject.model} on {hardware}, {input_tokens} in, {output_tokens} out")
    unseen = left_out() if cross_check else []
    if as_json:
        typer.echo(json.dumps(_facts(subject, found, errors, unseen, published, price, prices), indent=1))
    else:
        console = wide_console()
        _head(console, subject, found, errors, unseen)
        if found.front:
            _table(console, found.front, rows, price, prices)
            for line in text_plot({name: values for name, values in series.items() if values}):
                console.print(line, highlight=False, markup=False)
            for r in published:
                a = r.anchor
                figures = f"{a.total:,.0f} total tokens/s/GPU at {a.per_user:g} tokens/s/user"
                console.print(f"published: {figures}, {a.engine}, {a.source}", highlight=False, markup=False)
        else:
            console.print(_nothing(found, slo_tokens_per_second_user, ttft), highlight=False)
    if not found.front:
        raise typer.Exit(1)


def _subject(
    known: Catalogue,
    model: str,
    hardware: str,
    engine: str,
    input_tokens: int,
    output_tokens: int,
    gpus: int | None,
    acceptance: str | None,
) -> Subject:
    from fourfold.common.recipe.planning.anchors import acceptance_of
    from fourfold.common.recipe.planning.planner import Subject
    from fourfold.common.recipe.sizing.quantisation import Formats
    from fourfold.common.recipe.sizing.traits import read_config, read_traits
    from fourfold.common.recipe.sizing.weights import weights

    sheet = known.hardware(hardware, "--hardware")
    path, formats, name = Path(model), {}, model
    if not (path.suffix == ".json" and path.is_file()):
        card = known.model(model, "MODEL")
        path, formats = known.model_path(model).parent / card.config, card.formats
    traits = read_traits(read_config(path), str(path))
    found = tuple(weights(traits, Formats(traits.config, formats)))
    drafter = "dspark" if traits.dspark else "mtp" if traits.draft_layers else ""
    lengths = acceptance_of(str(traits.get("model_type", "")), drafter) if acceptance is None else _lengths(acceptance)
    most = gpus or max(sheet.nvlink_domain, sheet.gpus_per_node)
    return Subject(traits, found, sheet, engine, input_tokens, output_tokens, most, lengths if drafter else (), name)


def _lengths(text: str) -> tuple[float, ...]:
    from fourfold.common.errors import FourfoldError

    if text.strip().lower() == "none":
        return ()
    try:
        lengths = tuple(float(item) for item in text.split(","))
    except ValueError:
        raise FourfoldError(f"--acceptance {text}: expected numbers such as 1.8,2.3, or none") from None
    for count, length in enumerate(lengths, 1):
        if not 1 <= length <= 1 + count:
            raise FourfoldError(f"--acceptance: {length:g} with {count} draft tokens; expected 1 to {1 + count}")
    return lengths


def _price(known: Catalogue, prices: str | None, hardware: str) -> float | None:
    from fourfold.common.errors import FourfoldError

    if prices is None:
        return None
    sheet = known.prices(prices, "--prices")
    if hardware not in sheet.gpu_hour:
        raise FourfoldError(f"--prices {prices}: no price of {hardware}; it has {', '.join(sheet.gpu_hour)}")
    return sheet.gpu_hour[hardware]


def _same(residual: Residual, subject: Subject) -> bool:
    a = residual.anchor
    same = a.input_tokens == subject.input_tokens and a.output_tokens == subject.output_tokens
    return same and a.model == subject.model and a.hardware == subject.sheet.id and a.metric == "user"


def _cost(point: Point, price: float) -> float:
    """Dollars for a million tokens, input and output."""
    return price * 1e6 / (3600 * point.total)


def _facts(
    subject: Subject,
    found: Plan,
    errors: list[Residual],
    unseen: list[Residual],
    published: list[Residual],
    price: float | None,
    prices: str | None,
) -> dict[str, Any]:
    from fourfold.common.recipe.planning.calibrate import calibrate, typical_error

    def facts(point: Point) -> dict[str, Any]:
        out = {
            "kind": point.kind,
            "layout": point.layout,
            "prefill": point.prefill and {"parallel": point.prefill[0].model_dump(), "replicas": point.prefill[1]},
            "decode": {"parallel": point.decode[0].model_dump(), "replicas": point.decode[1]},
            "draft_tokens": point.drafts,
            "users_per_rank": point.users,
            "tokens_per_second_user": point.per_user,
            "total_tokens_per_second_gpu": point.total,
            "output_tokens_per_second_gpu": point.output,
            "ttft_seconds": point.ttft,
            "gpus": point.gpus,
            "tight_memory": point.tight,
            "beyond_calibration": list(point.beyond),
        }
        if price is not None:
            out |= {"dollars_per_million_total_tokens": _cost(point, price), "prices": prices}
        return out

    return {
        "model": subject.model,
        "hardware": subject.sheet.id,
        "engine": subject.engine,
        "input_tokens": subject.input_tokens,
        "output_tokens": subject.output_tokens,
        "acceptance_lengths": list(subject.acceptance),
        "calibration": {**vars(calibrate()), "typical_error": typical_error(errors)},
        "anchors": [_anchor(r) for r in errors],
        "cross_check": [_anchor(r) for r in unseen],
        "beyond_calibration": list(found.beyond),
        "does_not_fit": {role: [f.case.parallel.model_dump() for f in fits] for role, fits in found.refused.items()},
        "front": [facts(point) for point in found.front],
        "published": [
            {
                "kind": "published",
                "what": r.anchor.what,
                "tokens_per_second_user": r.anchor.per_user,
                "total_tokens_per_second_gpu": r.anchor.total,
                "source": r.anchor.source,
            }
            for r in published
        ],
    }


def _anchor(r: Residual) -> dict[str, Any]:
    a = r.anchor
    facts = {"what": a.what, "metric": a.metric, "model": a.model, "hardware": a.hardware, "source": a.source}
    return {
        **facts,
        "published": r.published,
        "predicted": r.predicted,
        "error": r.error,
        "calibrates": a.calibrates,
    }


def _head(console: Console, subject: Subject, found: Plan, errors: list[Residual], unseen: list[Residual]) -> None:
    from fourfold.common.recipe.planning.anchors import by_position
    from fourfold.common.recipe.planning.calibrate import typical_error
    from fourfold.common.recipe.planning.layouts import name_of

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    say(
        f"{subject.model} on {subject.sheet.id}, {subject.input_tokens} tokens in, {subject.output_tokens} out, "
        f"at most {subject.most_gpus} GPUs, memory as {subject.engine} accounts it"
    )
    used = [r for r in errors if r.anchor.calibrates]
    worst = max(used, key=lambda r: abs(r.error))
    say(
        f"predicted by a roofline calibrated on {len(used)} published figures: typical error "
        f"{typical_error(errors):.0%}, worst {worst.error:+.0%} ({worst.anchor.what}, {worst.anchor.hardware}); "
        "nothing here is measured"
    )
    if unseen:
        worst = max(unseen, key=lambda r: abs(r.error))
        typical = typical_error(unseen)
        say(f"each figure predicted from the others: typical error {typical:.0%}, worst {worst.error:+.0%}")
    for r in errors:
        if not r.anchor.calibrates:
            a = r.anchor
            say(f"  not calibrated on: {a.model}, {a.what}: published {r.published:,.0f}, predicted {r.predicted:,.0f}")
    for line in found.beyond:
        say(f"beyond calibration: {line}; read the order, not the figures")
    if subject.acceptance:
        chances = ", ".join(f"{chance:.2f}" for chance in by_position(subject.acceptance))
        say(f"published chance that draft token 1, 2, ... is accepted: {chances}")
    elif subject.traits.draft_layers:
        say("no published acceptance for this model's drafts: planned without speculation; give --acceptance")
    refused: dict[str, list[str]] = {}
    for role, fits in found.refused.items():
        for fit in fits:
            refused.setdefault(name_of(fit.case.parallel), []).append(role)
    if refused:
        words = [n if len(roles) == len(found.refused) else f"{n} ({', '.join(roles)})" for n, roles in refused.items()]
        say(f"does not fit: {'; '.join(words)}")
    for text in subject.traits.unknown:
        say(f"unknown trait: {text}")


def _table(console: Console, points: tuple[Point, ...], rows: int, price: float | None, prices: str | None) -> None:
    from rich.table import Table

    columns = ["tokens/s/user", "total tokens/s/GPU", "output", "TTFT s", "layout (prefill : decode)", "GPUs", "drafts"]
    columns += ["users a rank"] + ([f"$/M total ({prices})"] if price is not None else []) + ["beyond calibration"]
    table = Table(*columns, title="predicted, no deployment better in both")
    for column in table.columns[:4]:
        column.justify = "right"
    stride = max(1, -(-len(points) // rows))
    for point in points[::stride]:
        cells = [f"{point.per_user:.1f}", f"{point.total:,.0f}", f"{point.output:,.0f}", f"{point.ttft:.2f}"]
        cells += [point.layout + (" (tight)" if point.tight else ""), str(point.gpus), str(point.drafts)]
        cells += [str(point.users)] + ([f"{_cost(point, price):.3f}"] if price is not None else [])
        table.add_row(*cells, ", ".join(point.beyond))
    console.print(table)


def _nothing(found: Plan, per_user: float | None, ttft: float | None) -> str:
    if not found.points:
        return "no layout fits: see fourfold recipe fit for what is missing"
    fastest = max(found.points, key=lambda p: p.per_user)
    soonest = min(found.points, key=lambda p: p.ttft)
    asked = [f"{per_user:g} tokens/s/user"] if per_user else []
    asked += [f"{ttft:g} s to the first token"] if ttft else []
    return (
        f"nothing is predicted to keep {' and '.join(asked)}: the fastest user gets {fastest.per_user:.1f} tokens/s "
        f"({fastest.layout}), the first token comes after {soonest.ttft:.2f} s at best ({soonest.layout})"
    )

"""`fourfold recipe plan`: its calibration on published figures, what it refuses, and what it says of itself."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fourfold.common.cli import app
from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.planning.anchors import ACCEPTANCE, ANCHORS, acceptance_of, by_position
from fourfold.common.recipe.planning.calibrate import (
    calibrate,
    left_out,
    loss,
    predicted,
    residuals,
    shipped,
    typical_error,
)
from fourfold.common.recipe.planning.layouts import name_of, possible
from fourfold.common.recipe.planning.planner import Plan, Subject, front, plan
from fourfold.common.recipe.planning.plot import png_plot, text_plot
from fourfold.common.recipe.planning.roofline import Machine
from fourfold.common.recipe.planning.serving import Job, decode_rate, decode_step, prefill_seconds
from fourfold.common.recipe.schema import Parallel

DEP4, DEP8 = Parallel(data=4, expert=4), Parallel(data=8, expert=8)
USED = tuple(anchor for anchor in ANCHORS if anchor.calibrates)


def subject(model: str = "deepseek-v4-pro", hardware: str = "gb300-nvl72", **changes: Any) -> Subject:
    traits, weights = shipped(model)
    sheet = Catalogue().hardware(hardware)
    lengths = acceptance_of(str(traits.get("model_type", "")), "mtp")
    made = Subject(traits, weights, sheet, "vllm", 8192, 1024, 72, lengths, model)
    return replace(made, **changes)


@pytest.fixture(scope="module")
def pro() -> Plan:
    """V4-Pro on GB300, as published."""
    return plan(subject(), calibrate())


def machine(parallel: Parallel = DEP8, model: str = "deepseek-v4-pro", hardware: str = "gb300-nvl72") -> Machine:
    return Machine(*shipped(model), parallel, Catalogue().hardware(hardware))


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["recipe", "plan", *args], catch_exceptions=False)


def test_calibration_is_the_best_nearby_and_explains_its_anchors() -> None:
    by = calibrate()
    best = loss(by, USED)
    for name in ("latency", "bandwidth", "compute"):
        for factor in (0.95, 1.05):
            assert loss(replace(by, **{name: getattr(by, name) * factor}), USED) > best
    assert 0 < by.bandwidth < 1 and 0 < by.compute < 1 and 1e-6 < by.latency < 1e-3
    assert typical_error(residuals(by)) < 0.2
    for anchor in USED:
        assert abs(predicted(anchor, by).error) < 0.4, anchor.what


def test_figures_left_out_are_predicted_from_the_others() -> None:
    found = left_out()
    assert len(found) == len(USED)
    assert typical_error(residuals(calibrate())) < typical_error(found) < 0.25
    assert max(abs(r.error) for r in found) < 0.5


def test_calibration_follows_the_figures_that_it_is_given() -> None:
    slower = tuple(replace(a, per_user=a.per_user / 2, total=a.total / 2) for a in USED)
    by, other = calibrate(), calibrate(slower)
    assert other.latency > by.latency
    assert loss(other, slower) < loss(by, slower)


def test_anchors_name_their_source_and_shipped_data() -> None:
    known = Catalogue()
    for anchor in ANCHORS:
        assert anchor.source and anchor.model in known.names("models")
        assert anchor.hardware in known.names("hardware")
        assert anchor.total or anchor.per_user


def test_more_users_give_more_tokens_in_all_and_fewer_each() -> None:
    by, job = calibrate(), Job(8192, 1024)
    rates = [decode_rate(machine(), by, job, users) for users in (1, 8, 64, 256)]
    assert rates == sorted(rates, reverse=True)
    assert 256 * rates[3] > 64 * rates[2] > 8 * rates[1]


def test_what_a_step_costs() -> None:
    by, job = calibrate(), Job(8192, 1024)
    assert decode_step(machine(DEP4), by, job, 8) > decode_step(machine(DEP8), by, job, 8)  # more experts to read
    short, long = Job(1024, 1024), Job(65536, 1024)
    assert decode_step(machine(), by, long, 64) > decode_step(machine(), by, short, 64)
    assert prefill_seconds(machine(), by, long) > 8 * prefill_seconds(machine(), by, job)
    drafting = Job(8192, 1024, 3, 2.49)
    assert decode_step(machine(), by, drafting, 8) > decode_step(machine(), by, job, 8)
    assert decode_rate(machine(), by, drafting, 8) > decode_rate(machine(), by, job, 8)
    slow = Machine(*shipped("deepseek-v4-pro"), DEP8, Catalogue().hardware("h200"))  # no FP4: falls back to FP8
    assert prefill_seconds(slow, by, job) > 2 * prefill_seconds(machine(), by, job)


def test_speculation_saturates_as_published() -> None:
    chances = by_position(ACCEPTANCE["dsv4_mtp"])
    assert chances[0] == 0.79 and chances == sorted(chances, reverse=True)
    best = max(pro_drafts(users=8), key=lambda item: item[1])[0]
    assert best in (2, 3)  # the gain of a fourth draft token is 0.05 tokens


def pro_drafts(users: int) -> list[tuple[int, float]]:
    lengths = ACCEPTANCE["dsv4_mtp"]
    jobs = [Job(8192, 1024, n, lengths[n - 1]) for n in range(1, len(lengths) + 1)]
    return [(job.drafts, decode_rate(machine(), calibrate(), job, users)) for job in jobs]


def test_layouts_divide_heads_experts_and_nodes() -> None:
    traits, _ = shipped("deepseek-v4-pro")
    names = {name_of(p) for p in possible(traits, Catalogue().hardware("gb300-nvl72"), 72)}
    assert {"TP1", "TP4", "TP64", "DEP4", "DEP32"} <= names
    alone = {name_of(p) for p in possible(traits, Catalogue().hardware("h200"), 72)}
    assert "DEP8" in alone and "DEP16" not in alone  # eight GPUs reach each other


def test_what_does_not_fit_is_in_no_point(pro: Plan) -> None:
    found = plan(subject(hardware="gb200-nvl72"), calibrate())
    refused = {name_of(fit.case.parallel) for fit in found.refused["decode"]}
    assert {"TP4", "DEP4"} <= refused
    assert not any(name_of(point.decode[0]) in refused for point in found.points)
    assert "DEP4" not in {name_of(fit.case.parallel) for fit in pro.refused["decode"]}


def test_the_front_is_not_dominated_and_is_sorted(pro: Plan) -> None:
    assert pro.front and list(pro.front) == front(pro.points)
    for before, after in zip(pro.front, pro.front[1:], strict=False):
        assert before.per_user > after.per_user and before.total < after.total
    for point in pro.front:
        assert not any(p.per_user > point.per_user and p.total > point.total for p in pro.points)
        assert point.gpus <= 72 and point.kind == "predicted"
        assert point.output == pytest.approx(point.total * 1024 / 9216)


def test_the_front_passes_near_the_published_figures(pro: Plan) -> None:
    """InferenceX and SGLang: 10,000 tokens/s/GPU at 15, 11,200 at 50 tokens/s/user; two stand below the best."""
    for per_user, total in ((15, 10000), (50, 11200)):
        best = max(point.total for point in pro.points if point.per_user >= per_user)
        assert best == pytest.approx(total, rel=0.25)


def test_points_say_where_they_leave_the_calibration(pro: Plan) -> None:
    assert pro.beyond == ()
    inside = [p for p in pro.points if p.prefill and name_of(p.decode[0]) == "DEP8" and name_of(p.prefill[0]) == "DEP4"]
    assert any(not point.beyond for point in inside)
    assert all(point.beyond for point in pro.points if name_of(point.decode[0]) == "DEP32")
    crowded = [p for p in pro.points if p.prefill is None and p.users * p.decode[0].data > 20]
    assert crowded and all(any("users of one role" in text for text in p.beyond) for p in crowded)
    other = plan(subject("gpt-oss-120b", "h200", input_tokens=1000, acceptance=(), most_gpus=8), calibrate())
    assert [line.split()[0] for line in other.beyond] == ["model", "hardware", "1000"]


def test_service_levels_filter() -> None:
    by = calibrate()
    kept = plan(subject(), by, per_user=50, ttft=1.0)
    assert kept.front and all(point.per_user >= 50 and point.ttft <= 1 for point in kept.front)
    assert not plan(subject(), by, per_user=1e6).front


def test_command_as_json_with_and_without_prices() -> None:
    known = ["deepseek-v4-pro", "--hardware", "gb300-nvl72", "--json"]
    plain = run(*known)
    assert plain.exit_code == 0 and "dollars" not in plain.output
    data = json.loads(run(*known, "--prices", "owned-hyperscaler").output)
    for point in data["front"]:
        expected = 2.652 * 1e6 / (3600 * point["total_tokens_per_second_gpu"])
        assert point["dollars_per_million_total_tokens"] == pytest.approx(expected)
        assert point["prices"] == "owned-hyperscaler" and point["kind"] == "predicted"
    assert {row["kind"] for row in data["published"]} == {"published"}
    assert data["calibration"]["typical_error"] > 0
    assert {anchor["calibrates"] for anchor in data["anchors"]} == {True, False}


def test_cost_formula_is_the_published_one() -> None:
    """InferenceX: $0.119 and $0.280 for a million tokens at 6,182 and 2,189 tokens/s/GPU."""
    from fourfold.common.recipe.planning.command import _cost

    made = plan(subject(), calibrate()).front[0]
    assert _cost(replace(made, total=6182), 2.652) == pytest.approx(0.119, abs=0.001)
    assert _cost(replace(made, total=2189), 2.21) == pytest.approx(0.280, abs=0.001)


def test_command_prints_error_extrapolation_and_plot() -> None:
    found = run("gpt-oss-120b", "--hardware", "h200", "--rows", "3")
    text = " ".join(found.output.split())
    assert found.exit_code == 0
    assert "typical error" in text and "nothing here is measured" in text
    assert "beyond calibration: model gpt-oss-120b" in text and "beyond calibration: hardware h200" in text
    assert "total tokens/s/GPU (. predicted)" in text


def test_command_where_nothing_keeps_the_service_level(tmp_path: Path) -> None:
    found = run("deepseek-v4-pro", "--hardware", "gb300-nvl72", "--slo-tokens-per-second-user", "9999")
    assert found.exit_code == 1 and "nothing is predicted to keep 9999 tokens/s/user" in found.output
    config = dict(shipped("deepseek-v4-pro")[0].config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    small = run(str(path), "--hardware", "h200", "--gpus", "4")
    assert small.exit_code == 1 and "no layout fits" in small.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--acceptance", "1.8,9"], "9 with 2 draft tokens; expected 1 to 3"),
        (["--acceptance", "many"], "expected numbers"),
        (["--engine", "trt"], "expected vllm or sglang"),
        (["--prices", "list-coreweave-2026-02"], "no price of gb300-nvl72"),
        (["--plot", "out.pdf"], "ends in .png"),
    ],
)
def test_wrong_options_are_named(args: list[str], message: str) -> None:
    with pytest.raises(FourfoldError, match=message):
        run("deepseek-v4-pro", "--hardware", "gb300-nvl72", *args)


def test_plot_without_matplotlib_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FourfoldError, match="pip install matplotlib"):
        png_plot({"predicted": [(1, 2)]}, tmp_path / "p.png", "x")
    assert not list(tmp_path.iterdir())


def test_text_plot_puts_points_where_they_are() -> None:
    lines = text_plot({"predicted": [(100, 0), (0, 50)], "published": [(100, 50)]}, width=20, height=5)
    assert lines[0] == "total tokens/s/GPU (. predicted, O published)"
    top, bottom = lines[1], lines[5]
    assert top.split("|")[1].startswith(".") and top.endswith("O")
    assert bottom.endswith(".") and bottom.index(".") > top.index("|") + 15
    assert text_plot({}) == ["nothing to draw"]

"""The parts of ``fourfold bench mtp`` that need no server: prompts, groups, flags, and the arithmetic of its table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fourfold.common.bench import machine, mtp
from fourfold.common.bench.flow import Flow
from fourfold.common.bench.mtp import configurations, draft_directory, groups
from fourfold.common.bench.mtp_plan import Configuration, Plan
from fourfold.common.bench.mtp_rows import ADAPTIVE, ENGINE, HYBRID, MIXED, NONE, Turn, derive, fixed, rows
from fourfold.common.bench.prompts import PROMPTS
from fourfold.common.cli import app
from fourfold.common.demo.model import SMOLLM2_HEAD
from fourfold.common.errors import FourfoldError
from fourfold.common.mtp import prompts as probe
from fourfold.common.settings import METHOD, parse_settings

PLAN = Plan("vllm", Path("model"), Path("draft"), [1, 8], ["chat"], [1, 3], (8, 2), 64, 1, None, eager=True)


def turn(
    weights: str, name: str, speed: float, number: int = 0, drafts: int = 0, accepted: tuple[int, ...] = ()
) -> Turn:
    return Turn(weights, name, "chat", 1, number, Flow(2.0, int(2 * speed), drafts, accepted))


def test_prompts_are_many_different_and_in_no_other_set() -> None:
    assert len(PROMPTS["chat"]) >= 48 and len(PROMPTS["edit"]) >= 32
    every = [prompt for kind in PROMPTS.values() for prompt in kind]
    assert len(every) == len(set(every)) and not set(every) & set(probe.PROMPTS)
    assert all(len(prompt) < 100 for prompt in PROMPTS["chat"])
    assert all(400 < len(prompt) < 1400 for prompt in PROMPTS["edit"])
    repeat, correct = (PROMPTS["edit"][i] for i in (0, 24))
    assert repeat.partition("\n\n")[2] != correct.partition("\n\n")[2]  # there is something to correct


def test_configurations_always_have_their_base() -> None:
    found = configurations(["bf16", "nvfp4", MIXED], [1, 2], [])
    labels = [c.label for c in found]
    assert labels[:2] == ["bf16 none", "nvfp4 none"] and len(labels) == len(set(labels)) == 2 + 2 * 4 + 2
    assert f"{MIXED} {ADAPTIVE}" not in labels
    chosen = configurations(["bf16", MIXED], [1, 2], ["bf16-head k=2"])
    assert [c.label for c in chosen] == ["nvfp4 none", f"{MIXED} k=2"]
    with pytest.raises(FourfoldError, match="--only k=9"):
        configurations(["bf16"], [1], ["k=9"])


def test_stock_is_vllm_without_fourfold() -> None:
    found = configurations(["bf16", "nvfp4"], [1], [], stock=True)
    assert [c.label for c in found[:3]] == ["bf16 none", "nvfp4 none", "bf16 stock"]
    assert PLAN.arguments(found[2]) == PLAN.arguments(found[0]) and PLAN.environment(found[0]) == {}
    assert PLAN.environment(found[2]) == {"FOURFOLD_DISABLE": "1"}
    turned = configurations(["nvfp4", "bf16"], [1], [], stock=True)
    assert {c.label for c in turned} == {c.label for c in found}
    with pytest.raises(FourfoldError, match="--stock: vLLM without fourfold serves BF16"):
        configurations(["nvfp4"], [1], [], stock=True)


@pytest.mark.parametrize("alive", [2, 3, 5, 20])
def test_groups_fit_and_compare_with_their_base(alive: int) -> None:
    found = configurations(["bf16", "nvfp4", MIXED], [1, 2, 3, 4], [])
    split = groups(found, alive)
    assert {c for group in split for c in group} == set(found)
    for group in split:
        assert len(group) <= alive and len(group) > 1
        for c in group:
            assert Configuration(c.weights.split("+")[0], NONE) in group
    assert (len(split) == 1) == (alive == 20)


def speculative(configuration: Configuration) -> dict[str, object]:
    args = PLAN.arguments(configuration)
    return json.loads(args[args.index("--speculative-config") + 1])


def test_flags_of_each_configuration() -> None:
    plain = PLAN.arguments(Configuration("bf16", NONE))
    assert "--speculative-config" not in plain and METHOD not in plain and "--enforce-eager" in plain
    for weights, target, head in (("bf16", False, False), ("nvfp4", True, True), (MIXED, True, False)):
        configuration = Configuration(weights, fixed(3))
        assert ("--quantization" in PLAN.arguments(configuration)) == target
        expected = {"method": "mtp", "model": "draft", "num_speculative_tokens": 3}
        expected |= {"use_local_argmax_reduction": True, "disable_eagle_block_drop": True}
        assert speculative(configuration) == expected | ({"quantization": METHOD} if head else {})
    adaptive = Configuration("bf16", ADAPTIVE)
    assert speculative(adaptive)["num_speculative_tokens_per_batch_size"] == [[1, 8, 3]]
    assert "fourfold.vllm_ext.adaptive_worker.AdaptiveWorker" in PLAN.arguments(adaptive)
    args = PLAN.arguments(Configuration("nvfp4", HYBRID))
    settings = parse_settings(json.loads(args[args.index("--additional-config") + 1])["fourfold"], "test")
    assert (settings.mtp.hybrid.max_draft, settings.mtp.hybrid.head_tokens) == (8, 2)


def test_flags_of_sglang(tmp_path: Path) -> None:
    """Fixed lengths and SGLang's own learned one are EAGLE, what fourfold learns or finds in texts is its algorithm."""
    plan = replace(PLAN, engine="sglang", draft=tmp_path)
    names = [c.name for c in configurations(["bf16"], [1, 3], [], engine="sglang")]
    assert names == [NONE, "k=1", "k=3", ENGINE, ADAPTIVE, HYBRID]
    plain = plan.arguments(Configuration("nvfp4", NONE))
    assert plain[-2:] == ["--quantization", METHOD] and "--speculative-algorithm" not in plain
    found = {name: plan.arguments(Configuration("nvfp4", name)) for name in names[1:]}
    for name, args in found.items():
        flags = dict(zip(args, args[1:], strict=False))
        assert flags["--speculative-algorithm"] == ("FOURFOLD_MTP" if name in (ADAPTIVE, HYBRID) else "EAGLE")
        assert flags["--speculative-draft-model-quantization"] == METHOD
        steps = {"k=1": "1", "k=3": "3", ADAPTIVE: "3", HYBRID: "8", ENGINE: None}[name]
        assert flags.get("--speculative-num-steps") == steps
        assert ("--speculative-adaptive" in args) == (name == ENGINE) and "--speculative-token-map" not in args
    (tmp_path / "vocabulary.pt").touch()
    assert "--speculative-token-map" in plan.arguments(Configuration("bf16", "k=1"))
    settings = {
        name: parse_settings(json.loads(plan.environment(Configuration("bf16", name))["FOURFOLD_CONFIG"]), "test")
        for name in (ADAPTIVE, HYBRID)
    }
    assert (settings[ADAPTIVE].mtp.hybrid.enabled, settings[ADAPTIVE].mtp.hybrid.learn_head) == (False, True)
    assert (settings[HYBRID].mtp.hybrid.max_draft, settings[HYBRID].mtp.hybrid.head_tokens) == (8, 2)
    assert plan.environment(Configuration("bf16", "k=1")) == {}


def test_ratios_are_within_a_turn() -> None:
    turns = [turn("bf16", NONE, 10.0, 0), turn("bf16", "k=1", 12.0, 0, 100, (50,))]
    turns += [turn("bf16", NONE, 20.0, 1), turn("bf16", "k=1", 30.0, 1, 100, (70,))]
    turns += [turn("bf16", NONE, 40.0, 2), turn("bf16", "k=1", 40.0, 2, 200, (120,))]
    none, row = rows(turns)
    assert (none.ratio, none.length, none.acceptance) == (1.0, None, ())
    assert (row.tokens_per_second, row.low, row.high) == (30.0, 12.0, 40.0)
    assert row.ratio == 1.2  # of 1.2, 1.5 and 1.0; the ratio of the medians is 1.5
    assert row.length == 1.6 and row.acceptance == (0.6,)


def test_the_mix_compares_with_the_same_target() -> None:
    turns = [turn("bf16", NONE, 10.0), turn("nvfp4", NONE, 20.0), turn(MIXED, "k=1", 30.0, 0, 10, (5,))]
    assert [row.ratio for row in rows(turns)] == [1.0, 1.0, 1.5]


def test_derived_ratios() -> None:
    turns = [turn("bf16", NONE, 10.0), turn("bf16", "k=1", 12.0, 0, 10, (5,)), turn("bf16", "k=2", 16.0, 0, 10, (5, 3))]
    turns += [turn("bf16", ADAPTIVE, 15.0, 0, 10, (5, 3)), turn("bf16", HYBRID, 20.0, 0, 10, (8, 8))]
    turns += [
        turn("nvfp4", NONE, 20.0),
        turn("nvfp4", "k=1", 28.0, 0, 10, (5,)),
        turn("nvfp4", "k=2", 24.0, 0, 10, (4, 2)),
    ]
    turns += [turn(MIXED, "k=1", 28.0, 0, 10, (6,)), turn(MIXED, "k=2", 28.0, 0, 10, (6, 3))]
    bf16, nvfp4, mixed = derive(rows(turns))
    assert (bf16.best, bf16.best_ratio, bf16.compounding, bf16.head_acceptance) == ("k=2", 1.6, None, None)
    assert bf16.adaptive == pytest.approx(1.5 / 1.6) and bf16.hybrid == pytest.approx(2.0 / 1.6)
    assert (nvfp4.best, nvfp4.adaptive, nvfp4.hybrid) == ("k=1", None, None)
    assert nvfp4.compounding == pytest.approx(1.4 / 1.6)
    assert nvfp4.head_acceptance == pytest.approx((-0.1 - 0.3) / 2)
    assert mixed.weights == MIXED and mixed.compounding is None
    slow = [turn("bf16", NONE, 10.0), turn("bf16", "k=1", 8.0, 0, 10, (0,)), turn("bf16", ADAPTIVE, 9.5, 0, 10, (0,))]
    assert derive(rows(slow))[0].adaptive == pytest.approx(0.95)  # not drafting is the better choice


def test_a_head_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="--head"):
        draft_directory(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompts", "code"], "--prompts code"),
        (["--weights", "int4"], "--weights int4"),
        (["--batch", "0"], "--batch 0"),
        (["--requests", "-1"], "--requests -1"),
        (["--alive", "1"], "--alive 1"),
        (["--only", "k=7"], "--only k=7"),
        (["--stock", "--weights", "nvfp4"], "--stock"),
    ],
)
def test_wrong_arguments_are_named(options: list[str], named: str) -> None:
    error = CliRunner().invoke(app, ["bench", "mtp", *options]).exception
    assert isinstance(error, FourfoldError) and str(error).startswith(named) and "\n" not in str(error)


def test_servers_that_leave_no_memory_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < machine.available_memory() < math.inf
    monkeypatch.setattr(mtp, "LEAST_MEMORY", math.inf)
    with pytest.raises(FourfoldError, match=r"0 servers leave .* GiB of memory.*--alive"):
        next(iter(mtp.measure(PLAN, {}, 0, print)))


def test_a_failure_leaves_the_turns_before_it(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> Iterator[Turn]:
        yield turn("bf16", NONE, 10.0)
        yield turn("bf16", "k=1", 12.0, 0, 10, (5,))
        raise TimeoutError("timed out")

    monkeypatch.setattr(mtp, "measure", failing)
    options = ["--head", str(SMOLLM2_HEAD), "--weights", "bf16", "--only", "k=1"]
    result = CliRunner().invoke(app, ["bench", "mtp", str(smollm2), *options])
    assert result.exit_code == 1 and "after 2 turns: timed out" in result.output and "1.20" in result.output

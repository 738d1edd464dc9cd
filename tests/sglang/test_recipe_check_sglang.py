"""``fourfold recipe check`` with SGLang 0.5.23: every shipped recipe, and recipes with one thing wrong each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_checks import ROOT, Wrong, checks_of, shipped
from typer.testing import CliRunner

from fourfold.common.cli import app
from fourfold.common.recipe.check import proofs, snapshots
from fourfold.common.recipe.check.checking import Check, available, check
from fourfold.common.recipe.loading import Catalogue

VERSION = "0.5.23"
BUDGET = "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"
MEGA = {"moe-a2a-backend": "megamoe", "chunked-prefill-size": 16384, "max-running-requests": 256}
WRONG = {
    "unknown-option": Wrong(
        0,
        1,
        ".args.prefill-round-robin-balance",
        "unrecognized arguments",
        args={"prefill-round-robin-balance": True},
    ),
    "renamed-option": Wrong(
        0,
        1,
        ".args.cuda-graph-max-bs",
        "ambiguous option",
        args={"cuda-graph-max-bs": 256},
        new_name="cuda-graph-max-bs-decode",
    ),
    "wrong-choice": Wrong(0, 1, ".args.moe-a2a-backend", "invalid choice: 'mega'", args={"moe-a2a-backend": "mega"}),
    "dead-variable": Wrong(
        1, 2, ".env.SGLANG_ENABLE_SPEC_V2", "knows no SGLANG_ENABLE_SPEC_V2", env={"SGLANG_ENABLE_SPEC_V2": 1}
    ),
    "token-budget": Wrong(2, 3, "roles.aggregated", BUDGET, args=MEGA, env={BUDGET: 64}),
    "no-head": Wrong(
        2,
        3,
        "roles.aggregated",
        "DSpark with dp attention requires --enable-dp-lm-head",
        args={"speculative-algorithm": "DSPARK"},
    ),
    "no-draft": Wrong(
        2,
        3,
        "roles.aggregated",
        "requires setting --speculative-draft-model-path",
        parallel={"tensor": 4},
        args={"speculative-algorithm": "DSPARK"},
    ),
    "page-size": Wrong(
        4, 3, ".args.page-size", "asked for 64, the engine resolves 256", "warning", args={"page-size": 64}
    ),
}


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Check]:
    """Every recipe with SGLang."""
    return checks_of("sglang", WRONG, tmp_path_factory.mktemp("catalogue"))


@pytest.mark.parametrize("recipe", shipped("sglang"))
def test_shipped_recipes_pass(checks: dict[tuple[str, str], Check], recipe: str) -> None:
    done = checks[recipe, VERSION]
    assert done.by == "engine"
    assert [f for f in done.findings if f.severity == "error"] == []
    assert done.level == 4, done.findings
    assert done.resolved


@pytest.mark.parametrize("recipe", shipped("sglang"))
def test_shipped_proofs_are_what_a_check_says(checks: dict[tuple[str, str], Check], recipe: str) -> None:
    known = Catalogue()
    kept = proofs.load(known.roots[-1] / "proofs" / "proofs.json")
    proof = proofs.current(known.recipe(recipe), known, kept, "sglang", VERSION)
    done = checks[recipe, VERSION]
    assert proof is not None, "stale: fourfold recipe check --write"
    assert (proof.level, proof.by, proof.errors) == (done.level, done.by, done.errors)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(checks: dict[tuple[str, str], Check], name: str) -> None:
    case, done = WRONG[name], checks[f"wrong/{name}", VERSION]
    found = case.found(done)
    assert len(found) == 1, done.findings
    assert done.level == case.level, done.findings
    if case.new_name:
        assert found[0].rename is not None and found[0].rename.new == case.new_name


def test_a_snapshot_says_what_the_engine_says(checks: dict[tuple[str, str], Check], tmp_path: Path) -> None:
    for name, case in WRONG.items():
        case.write(tmp_path, "sglang", name)
    known = Catalogue([tmp_path])
    everything = [known.recipe(name) for name in known.recipe_paths if "sglang" in known.recipe(name).engines]
    for done in check(everything, known, available([], [f"sglang@{VERSION}"])):
        real = checks[done.recipe, VERSION]
        assert done.by == "snapshot" and done.level == min(real.level, 2), (done.findings, real.findings)


def test_a_snapshot_is_what_the_engine_says_of_itself(tmp_path: Path) -> None:
    written = CliRunner().invoke(
        app, ["recipe", "snapshot", "--engine", "sglang", "--envs", str(ROOT / ".envs"), "--out", str(tmp_path)]
    )
    assert written.exit_code == 0, written.output
    assert json.loads((tmp_path / f"sglang-{VERSION}.json").read_text()) == snapshots.load("sglang", VERSION)


def test_a_case_that_takes_too_long_is_a_finding(tmp_path: Path) -> None:
    WRONG["page-size"].write(tmp_path, "sglang", "page-size")
    known = Catalogue([tmp_path])
    from fourfold.common.recipe.check.targets import discover

    here = [t for t in discover(envs=ROOT / ".envs") if t.engine == "sglang"]
    [done] = check([known.recipe("wrong/page-size")], known, here, limit=0.01)
    assert done.level == 0 and any("no answer after 0 s" in finding.message for finding in done.findings)

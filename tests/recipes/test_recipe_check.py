"""``fourfold recipe check`` with vLLM 0.32 and 0.33: every shipped recipe, and recipes with one thing wrong each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from recipe_checks import ROOT, Wrong, checks_of, engines, shipped
from typer.testing import CliRunner

from fourfold.common.cli import app
from fourfold.common.recipe.check import matrix, proofs, snapshots
from fourfold.common.recipe.check.checking import Check
from fourfold.common.recipe.loading import Catalogue

VERSIONS = ("0.32.0", "0.33.0")
WRONG = {
    "unknown-option": Wrong(0, 1, ".args.no-such-option", "unrecognized arguments", args={"no-such-option": 3}),
    "renamed-value": Wrong(
        0,
        1,
        ".args.moe-backend",
        "invalid choice: 'deep_gemm_amxf4_mega_moe'",
        args={"moe-backend": "deep_gemm_amxf4_mega_moe"},
        new_name="moe-backend",
    ),
    "renamed-key": Wrong(
        0,
        1,
        ".args.attention-config",
        "use_fp4_indexer_cache",
        args={"attention-config": {"use_fp4_indexer_cache": True}},
        new_name="attention-config.indexer_kv_dtype",
    ),
    "abbreviated": Wrong(
        4,
        1,
        ".args.max-num-batched",
        "abbreviation of max-num-batched-tokens",
        "warning",
        args={"max-num-batched": 8192},
    ),
    "dead-variable": Wrong(
        1, 2, ".env.VLLM_RPC_TIMEOUT", "knows no VLLM_RPC_TIMEOUT", env={"VLLM_RPC_TIMEOUT": 100000}
    ),
    "hybrid-lb": Wrong(
        2, 3, "roles.aggregated", "requires `--data-parallel-size-local`", args={"data-parallel-hybrid-lb": True}
    ),
}


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Check]:
    """Every recipe with every version."""
    return checks_of("vllm", WRONG, tmp_path_factory.mktemp("catalogue"))


def test_both_versions_are_here() -> None:
    assert {target.version for target in engines("vllm")} >= set(VERSIONS), "make test-vllm sets up both"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("recipe", shipped("vllm"))
def test_shipped_recipes_pass(checks: dict[tuple[str, str], Check], recipe: str, version: str) -> None:
    done = checks[recipe, version]
    assert done.by == "engine"
    assert [f for f in done.findings if f.severity == "error"] == []
    assert done.level == 4, done.findings
    assert done.resolved


@pytest.mark.parametrize("recipe", shipped("vllm"))
@pytest.mark.parametrize("version", VERSIONS)
def test_shipped_proofs_are_what_a_check_says(checks: dict[tuple[str, str], Check], recipe: str, version: str) -> None:
    known = Catalogue()
    kept = proofs.load(known.roots[-1] / "proofs" / "proofs.json")
    proof = proofs.current(known.recipe(recipe), known, kept, "vllm", version)
    done = checks[recipe, version]
    assert proof is not None, "stale: fourfold recipe check --write"
    assert (proof.level, proof.by, proof.errors) == (done.level, done.by, done.errors)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(checks: dict[tuple[str, str], Check], name: str, version: str) -> None:
    case, done = WRONG[name], checks[f"wrong/{name}", version]
    found = case.found(done)
    assert len(found) == 1, done.findings
    assert done.level == case.level, done.findings
    assert found[0].source and found[0].engine == f"vllm {version}"
    if case.new_name:
        assert found[0].rename is not None and found[0].rename.new == case.new_name


def test_the_page_is_the_one_that_the_data_gives() -> None:
    known = Catalogue()
    assert (ROOT / "recipes" / matrix.PAGE).read_text() == matrix.page(known, known.roots[-1])


@pytest.mark.parametrize("version", VERSIONS)
def test_snapshots_say_what_the_engine_says(checks: dict[tuple[str, str], Check], version: str, tmp_path: Path) -> None:
    for name, case in WRONG.items():
        case.write(tmp_path, "vllm", name)
    known = Catalogue([tmp_path])
    from fourfold.common.recipe.check.checking import available, check

    targets = available([], [f"vllm@{version}"])
    everything = [known.recipe(name) for name in known.recipe_paths if "vllm" in known.recipe(name).engines]
    for done in check(everything, known, targets):
        real = checks[done.recipe, version]
        assert done.by == "snapshot" and done.level == min(real.level, 2), (done.findings, real.findings)
        assert any("by snapshot" in finding.message for finding in done.findings)


def test_the_command(tmp_path: Path) -> None:
    WRONG["renamed-key"].write(tmp_path, "vllm", "renamed-key")
    WRONG["dead-variable"].write(tmp_path, "vllm", "dead-variable")
    run = CliRunner()
    ask = ["recipe", "check", str(tmp_path), "--catalogue", str(tmp_path), "--snapshot", "--engine", "vllm@0.33"]
    bad = run.invoke(app, [*ask, "--json"])
    assert bad.exit_code == 1, bad.output
    levels = {c["recipe"]: c["level"] for c in json.loads(bad.stdout)["checks"]}
    assert levels == {"wrong/dead-variable": 1, "wrong/renamed-key": 0}
    fixed = run.invoke(app, [*ask, "--fix", "--write"])
    assert "indexer_kv_dtype" in (tmp_path / "wrong" / "renamed-key.yaml").read_text(), fixed.output
    kept = proofs.load(tmp_path / "proofs" / "proofs.json")
    assert kept["wrong/renamed-key"]["vllm 0.33.0"].by == "snapshot"
    page = run.invoke(app, ["recipe", "matrix", "--catalogue", str(tmp_path), "--write"])
    assert page.exit_code == 0 and "L2 s" in (tmp_path / "README.md").read_text()
    (tmp_path / "wrong" / "broken.yaml").write_text("schema: fourfold/recipe/1\nid: wrong/broken\n")
    also = run.invoke(app, ask)
    assert also.exit_code == 1 and "invalid: " in also.output and "broken.yaml" in also.output
    for refused in (
        [*ask[:2], "no/such"],
        [*ask, "--engine", "vllm@7"],
        [*ask[:2], str(tmp_path / "wrong" / "broken.yaml")],
    ):
        outcome = run.invoke(app, refused)
        assert outcome.exit_code != 0 and type(outcome.exception).__name__ == "FourfoldError", outcome.output


def test_a_snapshot_is_what_the_engine_says(tmp_path: Path) -> None:
    written = CliRunner().invoke(
        app, ["recipe", "snapshot", "--engine", "vllm@0.32", "--envs", str(ROOT / ".envs"), "--out", str(tmp_path)]
    )
    assert written.exit_code == 0, written.output
    shutil.copy(tmp_path / "vllm-0.32.0.json", tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text()) == snapshots.load("vllm", "0.32.0")

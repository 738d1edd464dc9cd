"""Renames: what the table says of options and environments, and what ``--fix`` writes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from fourfold.common.demo.environment import ENVS
from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check.fix import apply
from fourfold.common.recipe.check.renames import renamed, suggestions, table
from fourfold.common.recipe.check.result import Rename
from fourfold.common.recipe.check.snapshots import load, shipped
from fourfold.common.recipe.loading import read_yaml

VERSIONS = [("vllm", "0.32.0"), ("vllm", "0.33.0"), ("sglang", "0.5.23")]

CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("vllm", {"a": 1, "disable-log-requests": True}, {}, {"a": 1}, {}),
    (
        "vllm",
        {"attention-config": {"use_fp4_indexer_cache": True, "backend": "X"}},
        {},
        {"attention-config": {"backend": "X", "indexer_kv_dtype": "mxfp4"}},
        {},
    ),
    (
        "vllm",
        {"attention-config": '{"use_fp4_indexer_cache": true}'},
        {},
        {"attention-config": {"indexer_kv_dtype": "mxfp4"}},
        {},
    ),
    (
        "vllm",
        {"attention_config.use_fp4_indexer_cache": True},
        {},
        {"attention-config": {"indexer_kv_dtype": "mxfp4"}},
        {},
    ),
    ("vllm", {"attention-config": {"use_fp4_indexer_cache": False}}, {}, {}, {}),
    (
        "vllm",
        {"moe-backend": "deep_gemm_amxf4_mega_moe"},
        {},
        {"moe-backend": "deep_gemm_mega_moe"},
        {},
    ),
    ("vllm", {"moe-backend": "cutlass"}, {}, {"moe-backend": "cutlass"}, {}),
    (
        "vllm",
        {},
        {"VLLM_PREFIX_CACHE_RETENTION_INTERVAL": "32768", "VLLM_RPC_TIMEOUT": "1", "UCX_TLS": "tcp"},
        {"prefix-cache-retention-interval": 32768},
        {"UCX_TLS": "tcp"},
    ),
    (
        "vllm",
        {"prefix-cache-retention-interval": 1024},
        {"VLLM_PREFIX_CACHE_RETENTION_INTERVAL": "32768"},
        {"prefix-cache-retention-interval": 1024},
        {},
    ),
    (
        "sglang",
        {"cuda-graph-max-bs": 512, "nsa-decode-backend": "trtllm", "prefill-round-robin-balance": True},
        {"SGLANG_DISABLE_TP_MEMORY_INBALANCE_CHECK": "1"},
        {"cuda-graph-max-bs-decode": 512, "dsa-decode-backend": "trtllm"},
        {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"},
    ),
    (
        "sglang",
        {"moe-a2a-backend": "megamoe"},
        {
            "SGLANG_OPT_DEEPGEMM_MEGA_MOE_USE_FP4_ACTS": "1",
            "SGLANG_OPT_DEEPGEMM_MEGA_MOE_USE_MXF4_KIND": "1",
        },
        {"moe-a2a-backend": "megamoe", "enable-w4a4-mxfp4-megamoe": True},
        {},
    ),
    ("sglang", {}, {"SGLANG_OPT_DEEPGEMM_MEGA_MOE_USE_FP4_ACTS": "0"}, {}, {}),
]


@pytest.mark.parametrize(("engine", "options", "env", "new_options", "new_env"), CASES)
def test_suggestions_repair(engine: str, options: Any, env: Any, new_options: Any, new_env: Any) -> None:
    version = dict(VERSIONS)[engine]
    found = suggestions(engine, version, options, env)
    assert renamed(options, env, found) == (new_options, new_env)
    assert suggestions(engine, version, new_options, new_env) == []  # a repair needs no repair


def test_every_entry_says_what_to_do() -> None:
    """Each entry is met by a setting made from it, gives a source, and is gone after the repair."""
    for engine, part in table().engines.items():
        version = "0.33.0" if engine == "vllm" else "0.5.23"
        for entry in part.entries:
            said = next(iter(entry.values or {"1": None}))
            name = entry.option or entry.env
            assert name
            options, env = ({name: said}, {}) if entry.option else ({}, {name: said})
            (found,) = suggestions(engine, version, options, env)
            assert found.source and found.text.startswith(name)
            after = renamed(options, env, [found])
            assert suggestions(engine, version, *after) == [], entry


def vllm_sources() -> dict[str, Path]:
    """The package of vLLM 0.32, which is installed here, and of 0.33, which is unpacked beside it."""
    spec = importlib.util.find_spec("vllm")
    assert spec and spec.origin
    return {"0.32.0": Path(spec.origin).parent, "0.33.0": ENVS / "vllm-0.33.0" / "vllm"}


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0"])
def test_the_table_is_true_of_vllm(version: str) -> None:
    """Old names are in no parser and no table of variables of the sources, new ones are."""
    source = vllm_sources()[version]
    parsers = [source / "engine" / "arg_utils.py", *(source / "entrypoints").rglob("cli_args.py")]
    flags = "\n".join(path.read_text() for path in parsers)
    keys = "\n".join(path.read_text() for path in (source / "config").glob("*.py"))
    variables = (source / "envs.py").read_text()

    def has(option: str) -> bool:
        name, _, key = option.partition(".")
        if key:
            return re.search(rf"^    {key}:", keys, re.MULTILINE) is not None
        return f'"--{name}"' in flags or f"\n    {name.replace('-', '_')}:" in flags

    for entry in table().engines["vllm"].entries:
        if entry.versions and version not in SpecifierSet(entry.versions):
            assert entry.env and f'"{entry.env}":' in variables, entry  # the narrower range is needed
            continue
        if entry.env:
            assert f'"{entry.env}":' not in variables, entry
        elif entry.option != entry.to:
            assert entry.option and not has(entry.option), entry
        new = entry.to_option or (entry.to if entry.option else None)
        assert new is None or has(new), entry
        for value in (entry.values or {}).values() if new == "moe-backend" else ():
            assert value is None or f'"{value}"' in keys, entry


def test_the_table_is_true_of_snapshots() -> None:
    """The same of every shipped snapshot, SGLang's too; and what the snapshots know as new names exists."""
    for target in shipped():
        facts = load(target.engine, target.version)
        assert facts is not None
        for rename in of_table(target.engine, target.version):
            new = (rename.new or "").partition(".")
            if rename.kind == "env":
                assert rename.old not in facts["env"], rename
                assert rename.new is None or rename.new in facts["env"], rename
            elif rename.new is not None:
                assert new[0] in facts["options"], rename


def of_table(engine: str, version: str) -> list[Rename]:
    """Every rename that the table can give for a version."""
    out = []
    for entry in table().engines["vllm" if engine == "vllm" else "sglang"].entries:
        for said in entry.values or {"1": None}:
            name = entry.option or entry.env or ""
            out += suggestions(engine, version, *(({name: said}, {}) if entry.option else ({}, {name: said})))
    return out


def test_versions_scope_the_table() -> None:
    env = {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1"}
    assert suggestions("vllm", "0.32.0", {}, env) == []
    assert [r.old for r in suggestions("vllm", "0.33.0+cpu", {}, env)] == list(env)
    assert suggestions("vllm", "0.20.0", {"disable-log-requests": True}, {}) == []
    with pytest.raises(FourfoldError, match="version 'new' of vllm"):
        suggestions("vllm", "new", {}, {})


BLOCK = """\
# a recipe, its comments stay
schema: fourfold/recipe/1   # kept
engines:
  sglang:
    versions: "==0.5.23"
    env:
      # the fast path
      SGLANG_OPT_DEEPGEMM_MEGA_MOE_USE_FP4_ACTS: "1"  # measured
      SGLANG_OPT_DEEPGEMM_MEGA_MOE_USE_MXF4_KIND: "1"
      MC_FORCE_MNNVL: "1"
    args:
      cuda-graph-max-bs: 512  # per rank
      moe-a2a-backend: megamoe

    roles:
      prefill: {args: {nsa-prefill-backend: trtllm, prefill-round-robin-balance: true}}
      decode:
        env: {SGLANG_ENABLE_SPEC_V2: "1"}
  vllm:
    versions: ">=0.32"
    args: {attention-config: {use_fp4_indexer_cache: true}}
    roles: {aggregated: {}}
"""

FIXED = """\
# a recipe, its comments stay
schema: fourfold/recipe/1   # kept
engines:
  sglang:
    versions: "==0.5.23"
    env:
      # the fast path
      MC_FORCE_MNNVL: "1"
    args:
      cuda-graph-max-bs-decode: 512  # per rank
      moe-a2a-backend: megamoe
      enable-w4a4-mxfp4-megamoe: true

    roles:
      prefill: {args: {dsa-prefill-backend: trtllm}}
      decode:
        env: {}
  vllm:
    versions: ">=0.32"
    args: {attention-config: {use_fp4_indexer_cache: true}}
    roles: {aggregated: {}}
"""


def of_file(path: Path, engine: str, version: str) -> list[Rename]:
    """The renames of all settings of an engine in a file."""
    plan = read_yaml(path)["engines"][engine]
    out: list[Rename] = []
    for scope in [plan, *plan["roles"].values()]:
        found = suggestions(engine, version, scope.get("args") or {}, scope.get("env") or {})
        out += [rename for rename in found if rename not in out]
    return out


def test_fix_touches_only_what_changes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BLOCK)
    done = apply(path, "sglang", of_file(path, "sglang", "0.5.23"))
    assert path.read_text() == FIXED
    assert len(done) == 6 and any(line.startswith("engines.sglang.roles.prefill: nsa-") for line in done)
    assert of_file(path, "sglang", "0.5.23") == []
    apply(path, "vllm", of_file(path, "vllm", "0.32.0"))
    assert path.read_text() == FIXED.replace("{use_fp4_indexer_cache: true}", "{indexer_kv_dtype: mxfp4}")
    assert list(tmp_path.iterdir()) == [path]


LAYOUTS = [
    "engines:\n  vllm:\n    versions: 'x'\n    args:\n      attention-config: '{\"use_fp4_indexer_cache\": true}'\n"
    "    roles: {aggregated: {}}",
    "engines:\n  vllm:\n    env: {VLLM_RPC_TIMEOUT: 1, VLLM_PREFIX_CACHE_RETENTION_INTERVAL: 0}\n"
    "    roles:\n      aggregated: {}\n",
    "engines:\n  vllm:\n    env:\n      VLLM_ATTENTION_BACKEND: X\n    # after\n    roles:\n      aggregated: {}\n",
    "engines: {vllm: {env: {VLLM_ATTENTION_BACKEND: X}, roles: {aggregated: {args: {\n  disable-log-requests: true,\n"
    "  moe-backend: deep_gemm_amxf4_mega_moe}}}}}\n",
    'engines:\r\n  vllm:\r\n    args:\r\n      "disable-log-requests": true\r\n      x: 1 # ü\r\n'
    "    roles: {aggregated: {}}\r\n",
    "engines:\n  vllm:\n    args:\n      attention-config:\n        use_fp4_indexer_cache: true\n"
    "      kv-cache-memory: 1\n    roles:\n      aggregated:\n        args:\n          attention-config:\n"
    "            use_fp4_indexer_cache: true\n",
    "engines:\n  vllm:\n    roles:\n      aggregated:\n        env:\n          VLLM_USE_TRTLLM_ATTENTION: '0'",
]


@pytest.mark.parametrize("text", LAYOUTS)
def test_fix_in_every_layout(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode())
    comments = re.findall("#.*", text)
    found = of_file(path, "vllm", "0.32.0")
    assert found and apply(path, "vllm", found)
    after = path.read_bytes().decode()
    assert re.findall("#.*", after) == comments
    assert ("\r\n" in text) == ("\r\n" in after)
    assert of_file(path, "vllm", "0.32.0") == [] and yaml.safe_load(after)["engines"]["vllm"]["roles"]


REFUSED = [
    # an edit among lines of text
    ("engines:\n  vllm:\n    args:\n      attention-config: |\n        {\"use_fp4_indexer_cache\": true}\n"
     "    roles: {aggregated: {}}\n", "several lines"),
    # a comment in what would become one line
    ("engines:\n  vllm:\n    env:\n      # why\n      VLLM_RPC_TIMEOUT: 1\n    roles: {aggregated: {}}\n", "comment"),
    # roles that disagree
    ("engines:\n  vllm:\n    roles:\n      prefill: {args: {attention-config: {use_fp4_indexer_cache: true}}}\n"
     "      decode: {args: {attention-config: {use_fp4_indexer_cache: false}}}\n", "in one role and"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_fix_changes_nothing_that_it_cannot_place(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(FourfoldError, match=says) as error:
        apply(path, "vllm", of_file(path, "vllm", "0.32.0"))
    assert "nothing was changed" in str(error.value)
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_fix_names_the_recipe_that_an_old_name_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("extends: a/b\nengines:\n  sglang:\n    args: {x: 1}\n")
    with pytest.raises(FourfoldError, match="cuda-graph-max-bs: not among .* it comes from a/b"):
        apply(path, "sglang", suggestions("sglang", "0.5.23", {"cuda-graph-max-bs": 1}, {}))

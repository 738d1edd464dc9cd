"""The JSON Schemas that editors use: right for every shipped file, and they see what is wrong."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fourfold.common import cli
from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.json_schema import KINDS, PART, json_schema
from fourfold.common.recipe.loading import FOLDERS, Catalogue, merged
from fourfold.common.recipe.plain_yaml import read_yaml

SHIPPED = Catalogue()
FOLDER = {"model": "models", "hardware": "hardware", "prices": "prices"}


def _as_json(data: Any) -> Any:
    """Dates as an editor's validator sees them."""
    return json.loads(json.dumps(data, default=str))


def _problems(kind: str, data: Any) -> list[str]:
    """Each problem, with those inside of a choice."""

    def all_of(errors: Any) -> Iterator[Any]:
        for error in errors:
            yield error
            yield from all_of(error.context or ())

    found = jsonschema.Draft202012Validator(json_schema(kind)).iter_errors(_as_json(data))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in all_of(found)]


@pytest.mark.parametrize("kind", KINDS)
def test_schemas_are_schemas(kind: str) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema(kind))


def test_every_shipped_recipe_is_valid_as_written() -> None:
    names = list(SHIPPED.recipe_paths)
    assert len(names) >= 12
    extending = 0
    for name in names:
        data = read_yaml(SHIPPED.recipe_paths[name])
        assert _problems("recipe", data) == [], name
        extending += "extends" in data
        if "extends" not in data:
            assert SHIPPED.recipe(name).id == data["id"]
    assert extending < len(names)


@pytest.mark.parametrize("kind", FOLDER)
def test_every_shipped_sheet_is_valid_as_written(kind: str) -> None:
    folder = FOLDER[kind]
    assert folder in FOLDERS
    names = SHIPPED.names(folder)
    assert names
    for name in names:
        path = next(
            root / folder / f"{name}.yaml" for root in SHIPPED.roots if (root / folder / f"{name}.yaml").is_file()
        )
        assert _problems(kind, read_yaml(path)) == [], name


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("titel",), "x", "titel"),
        (("title",), 7, "7"),
        (("workload", "kind"), "chatty", "chatty"),
        (("workload", "input_tokens"), 0, "minimum"),
        (("engines", "vlm"), {}, "vlm"),
        (("engines", "vllm", "args", "--dtype"), "x", "--dtype"),
        (("engines", "vllm", "args", "nnodes"), 2, "nnodes"),
        (("engines", "vllm", "env", "A-B"), "x", "A-B"),
        (("engines", "vllm", "roles", "aggregated", "parallel"), {"tensors": 2}, "tensors"),
        (("schema",), "fourfold/recipe/2", "fourfold/recipe/1"),
        (("model",), ..., "model"),
    ],
)
def test_mistakes_are_seen_while_typing(path: tuple[str, ...], value: Any, said: str) -> None:
    """With and without a recipe that is extended; only there may keys be missing."""
    data = read_yaml(SHIPPED.recipe_paths["cpu/smollm2"])
    assert _problems("recipe", data) == []
    for extra in ({}, {"extends": "cpu/other"}):
        changed: Any = copy.deepcopy(data) | extra
        below = changed
        for key in path[:-1]:
            below = below[key]
        if value is ...:
            del below[path[-1]]
            assert bool(_problems("recipe", changed)) != bool(extra)
        else:
            below[path[-1]] = value
            assert any(said in problem for problem in _problems("recipe", changed))


def test_a_recipe_that_extends_may_be_short_and_take_away() -> None:
    short = {"schema": "fourfold/recipe/1", "id": "a/b", "extends": "cpu/smollm2"}
    assert _problems("recipe", short) == []
    assert _problems("recipe", short | {"engines": {"sglang": None, "vllm": {"args": {"dtype": None}}}}) == []
    assert _problems("recipe", short | {"evidence": [{"metric": "ratio"}]}), "a list replaces: its items are whole"
    assert _problems("recipe", {"id": "a/b"}) and _problems("recipe", {"extends": "cpu/smollm2"})
    base = read_yaml(SHIPPED.recipe_paths["cpu/smollm2"])
    assert "sglang" not in merged(base, short | {"engines": {"sglang": None}})["engines"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_described(kind: str) -> None:
    """Editors show it; only ids, schemas and notes say enough by their name."""
    schema = json_schema(kind)
    parts = {"": schema, **{n: p for n, p in schema["$defs"].items() if not n.startswith(PART)}}
    plain = {"schema", "id", "sources", "notes", "gpu", "released", "config_source", "image"}
    settings = {name for name in parts if name.endswith("Settings")}  # fourfold's own, described in README.md
    lacking = [
        f"{name}.{key}"
        for name, part in parts.items()
        if name not in settings
        for key, field in part.get("properties", {}).items()
        if key not in plain and "description" not in field
    ]
    assert not lacking


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fourfold", "recipe", "schema", "prices"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code and json.loads(capsys.readouterr().out) == json_schema("prices")
    with pytest.raises(FourfoldError, match="did you mean recipe"):
        json_schema("recipes")


def test_show_says_all_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every source, condition and flag of every shipped recipe; JSON with the same command lines."""

    def run(*given: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fourfold", "recipe", "show", *given])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        return capsys.readouterr().out

    for name in SHIPPED.recipe_paths:
        recipe = SHIPPED.recipe(name)
        text = " ".join(run(name).split())
        for evidence in recipe.evidence:
            assert " ".join(evidence.at.split()) in text
            assert evidence.source.url is None or evidence.source.url in text
            assert all(" ".join(change.split()) in text for change in evidence.mixes)
        assert text.count("SIMULATED acceptance") == sum(e.synthetic_acceptance for e in recipe.evidence)
        assert text.count("MIXES the gains") == sum(bool(e.mixes) for e in recipe.evidence)
        assert all(issue.id in text for issue in recipe.known_issues)
    name = next(iter(SHIPPED.recipe_paths))
    data = json.loads(run(name, "--json"))
    assert data["id"] == name and Path(data["file"]).is_file()
    assert all(start["command"][0] in ("vllm", "python") for starts in data["starts"].values() for start in starts)
    only = json.loads(run("cpu/smollm2", "--engine", "sglang", "--json"))
    assert list(only["starts"]) == ["sglang"]
    monkeypatch.setattr(sys, "argv", ["fourfold", "recipe", "show", "cpu/smollm2", "--engine", "trt"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and "it is for vllm, sglang" in capsys.readouterr().err

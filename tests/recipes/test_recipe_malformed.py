"""Malformed and contradictory recipes, cards and sheets: each is refused with file, key, value and what is allowed.

The cases are made in malformed_recipes. No case may start a process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from malformed_recipes import CASES, OF_EACH, RECIPE, Case, dump, write

from fourfold.common import cli
from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.loading import Catalogue


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process starts, whatever a file says."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a malformed recipe started {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for name in ("system", "popen", "fork", "posix_spawn", "execv", "execve", "execvp"):
        monkeypatch.setattr(os, name, refuse)


def test_the_good_files_are_good(tmp_path: Path) -> None:
    recipe = Catalogue([tmp_path]).recipe(write(tmp_path, {}))
    assert recipe.id == "r/full" and recipe.rehearsal is not None
    assert recipe.rehearsal.substitutions == {"moe-backend": None, "dtype": "float32"}


def test_there_are_hundreds() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 300


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path: Path) -> None:
    path = write(tmp_path, case.files)
    with pytest.raises(FourfoldError) as caught:
        Catalogue([tmp_path]).recipe(path)
    message = str(caught.value)
    for said in (*case.said, case.at):
        assert said in message
    assert all(
        line.startswith(str(tmp_path.resolve())) or line.startswith(str(tmp_path)) for line in message.split("\n")
    )
    assert message.isprintable() or message.replace("\n", "").isprintable()
    assert all(len(line) < 1500 for line in message.split("\n"))


@pytest.mark.parametrize("case", OF_EACH, ids=lambda case: case.name)
def test_the_command_says_so_and_exits_with_2(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, case.files)
    monkeypatch.setattr(sys, "argv", ["fourfold", "recipe", "show", str(path), "--catalogue", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    assert left.value.code == 2 and not out
    assert err.startswith("fourfold: ") and "Traceback" not in err
    for said in (*case.said, case.at):
        assert said in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cpu/smollm", "did you mean cpu/smollm2?"),
        ("../../etc/passwd", "no such file or id"),
        ("x" * 5000 + ".yaml", "no such file or id"),
        ("a\0b.yaml", "no such file or id"),
        ("", "no such file or id"),
    ],
    ids=["near", "path", "long", "nul", "empty"],
)
def test_recipes_that_are_not_there(given: str, said: str) -> None:
    with pytest.raises(FourfoldError, match=re.escape(said)):
        Catalogue().recipe(given)


def test_places_that_are_no_catalogue(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="nowhere: not a folder"):
        Catalogue([tmp_path / "nowhere"])
    folder = tmp_path / "r" / "folder.yaml"
    folder.mkdir(parents=True)
    with pytest.raises(FourfoldError, match="no such file or id"):
        Catalogue([tmp_path]).recipe(folder)
    for name in ("../hardware/gb300-nvl72", "/etc/passwd", "a" * 5000, "a\0"):
        with pytest.raises(FourfoldError, match="no file hardware/"):
            Catalogue().hardware(name)


def test_several_problems_have_a_line_each(tmp_path: Path) -> None:
    wrong = RECIPE | {"title": 7, "notes": "x", "workload": {"kind": "chat", "input_tokens": 0, "output_tokens": "1"}}
    with pytest.raises(FourfoldError) as caught:
        Catalogue([tmp_path]).recipe(write(tmp_path, {"r/full.yaml": dump(wrong)}))
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[1] for line in lines] == [
        "title",
        "workload.input_tokens",
        "workload.output_tokens",
        "notes",
    ]

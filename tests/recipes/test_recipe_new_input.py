"""fourfold recipe new: wrong, hostile and odd input; files are written whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from unseen_models import DENSE, SHIPPED, compose_at, index_of, model_at

from fourfold.common import cli
from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.dayzero import writing
from fourfold.common.recipe.dayzero.source import read_model
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.schema import ModelCard, Recipe

WRONG: list[tuple[str, str | dict[str, Any], str]] = [
    ("not JSON", "{", "not JSON"),
    ("a list", "[1]", "expected a JSON object"),
    ("deep", "[" * 100_000, "not JSON"),
    ("empty", "", "not JSON"),
    ("no size", {}, "hidden_size"),
    ("no heads", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 10}, "num_attention_heads"),
    ("text", DENSE | {"hidden_size": "big"}, "hidden_size"),
    ("negative", DENSE | {"num_hidden_layers": -1}, "num_hidden_layers"),
    ("vast", DENSE | {"num_hidden_layers": 10**9}, "expected at most 4096"),
    ("huge", DENSE | {"hidden_size": 10**40}, "hidden_size"),
    ("drafts", DENSE | {"num_nextn_predict_layers": 10**6}, "expected at most 64"),
    ("format", DENSE | {"torch_dtype": "float13"}, "float13"),
    ("a draft", DENSE | {"fourfold_mtp": {"family": "deepseek_v3"}}, "a draft directory"),
    ("index", DENSE | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP3"}}, "NVFP3"),
]


@pytest.mark.parametrize(("config", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_configs(
    config: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    code, out, err = _run(monkeypatch, capsys, str(folder), "--hardware", "h200", "--out", str(tmp_path / "out"))
    assert code == 2 and not out and err.startswith("fourfold: ") and said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def _wrong_values() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("deepseek-v4-pro-0813", "nemotron-3-ultra-nvfp4"):
        config = SHIPPED.config(name)
        for key in config:
            for value in ("x", -1, [["a"]], {"a": [1]}, 10**30):
                yield f"{key}={value!r}", config | {key: value}


def test_any_value_is_taken_or_refused_in_words(tmp_path: Path) -> None:
    tried = 0
    for what, config in _wrong_values():
        try:
            composed = compose_at(model_at(tmp_path / "m", config))
        except FourfoldError as error:
            assert "\n" not in str(error), what
        else:
            Recipe.model_validate(composed.recipe), ModelCard.model_validate(composed.card)
        tried += 1
    assert tried > 400


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    config = DENSE | {"architectures": ["\x1b[2J$(id)"], "\x1b[31mkey": "\x07", "x'; id #": 1, "zeta\nid": 2}
    names = ["mtp.0.\x1b[2Jstrange.weight"]
    path = model_at(tmp_path / "m", config | {"num_nextn_predict_layers": 1}, **index_of(names, 16_000_000_000))
    files = writing.write(tmp_path / "out", read_model(path), compose_at(path), False, [])
    text = files["recipe"].read_text() + files["card"].read_text()
    assert "\x1b" not in text and "\x07" not in text


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fourfold", "recipe", "new", *given])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_files_are_kept_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = model_at(tmp_path / "m", DENSE), tmp_path / "out"
    given = (str(model), "--hardware", "h200", "--out", str(out))
    code, text, _ = _run(monkeypatch, capsys, *given)
    assert code == 0 and "Confirm the memory" in text and "Next: fourfold recipe show" in text
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert sorted(str(p.relative_to(out)) for p in before) == ["m/h200-chat.yaml", "models/m.json", "models/m.yaml"]
    (model / "config.json").write_text(json.dumps(DENSE | {"num_hidden_layers": 16}))
    code, _, err = _run(monkeypatch, capsys, *given)
    assert code == 2 and "there already; --force replaces" in err
    assert all(path.read_bytes() == data for path, data in before.items())
    code, text, _ = _run(monkeypatch, capsys, *given, "--force", "--json")
    assert code == 0 and json.loads(text)["id"] == "m/h200-chat"
    assert (out / "models" / "m.json").read_bytes() == (model / "config.json").read_bytes()
    assert Catalogue([out]).recipe("m/h200-chat").model == "m"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that fails midway leaves what was there, and nothing else."""
    path, out = model_at(tmp_path / "m", DENSE), tmp_path / "out"
    writing.write(out, read_model(path), compose_at(path), False, [])
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (path / "config.json").write_text(json.dumps(DENSE | {"num_hidden_layers": 16}))
    replaced = os.replace

    def failing(source: Any, target: Any) -> None:
        if str(target).endswith("h200-chat.yaml") or str(target).endswith("gb300-nvl72-chat.yaml"):
            raise OSError(28, "No space left on device")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(FourfoldError, match="No space left"):
        writing.write(out, read_model(path), compose_at(path), True, [])
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--hardware", "gb300-nvl27"], "did you mean gb300-nvl72?"),
        (["--hardware", "../gb300"], "no file hardware/"),
        (["--hardware", "h200", "--workload", "chatt"], "did you mean chat?"),
        (["--hardware", "h200", "--name", "../x"], "expected lower-case letters"),
        (["--hardware", "h200", "--name", "models"], "no folder's name"),
        (["--hardware", "h200", "--repo", "../x"], "repo"),
        (["--hardware", "h200", "--repo", "-x/y"], "repo"),
    ],
)
def test_wrong_options(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_at(tmp_path / "m", DENSE)
    code, _, err = _run(monkeypatch, capsys, str(model), "--out", str(tmp_path / "out"), *given)
    assert code == 2 and said in err and not (tmp_path / "out").exists()
    code, _, err = _run(monkeypatch, capsys, str(tmp_path / "nowhere"), "--hardware", "h200")
    assert code == 2 and "no such file or directory" in err


def test_in_seconds_without_network_engine_or_torch(tmp_path: Path) -> None:
    """A whole run in a process of its own, in which sockets and torch are not to be had."""
    model = model_at(tmp_path / "new-model", SHIPPED.config("deepseek-v4-pro"))
    script = (
        "import socket, sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'vllm', 'sglang', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "def refuse(*args, **kwargs): raise OSError('no network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from fourfold.common import cli\n"
        f"sys.argv = ['fourfold', 'recipe', 'new', {str(model)!r}, '--hardware', 'gb300', '--out', "
        f"{str(tmp_path / 'out')!r}]\n"
        "cli.main()\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60
    assert Catalogue([tmp_path / "out"]).recipe("new-model/gb300-nvl72-chat").engines.keys() == {"vllm", "sglang"}

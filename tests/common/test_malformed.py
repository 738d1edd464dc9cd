"""Malformed checkpoints, statistics and settings: each a clear error, no traceback, nothing written."""

from __future__ import annotations

import itertools
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import INDEX, Damage, edit_bytes, edit_config, edit_header, edit_json
from safetensors.torch import load_file, save_file

from fourfold.common.errors import FourfoldError
from fourfold.common.quant.checkpoint.convert import Options, convert
from fourfold.common.quant.importance import load_importance
from fourfold.common.quant.source import read_source
from fourfold.common.settings import parse_settings

SHARD = "model-00002-of-00003.safetensors"


def _tensor(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path / SHARD)
        change(tensors)
        save_file(tensors, path / SHARD, {"format": "pt"})

    return damage


def _set(name: str, tensor: torch.Tensor) -> Damage:
    return _tensor(lambda tensors: tensors.update({name: tensor}))


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, Damage] = {
    "no config": lambda p: (p / "config.json").unlink(),
    "config is a list": edit_json("config.json", lambda c: [1]),
    "config is empty": lambda p: (p / "config.json").write_text("") and None,
    "config is binary": lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00") and None,
    "shard missing": lambda p: (p / SHARD).unlink(),
    "index without map": edit_json(INDEX, lambda i: {"metadata": {}}),
    "index map empty": edit_json(INDEX, lambda i: {"weight_map": {}}),
    "index map is a list": edit_json(INDEX, lambda i: {"weight_map": ["a"]}),
    "index leaves the folder": edit_json(INDEX, lambda i: i["weight_map"].update({UP: "../x.safetensors"})),
    "index names a number": edit_json(INDEX, lambda i: i["weight_map"].update({UP: 3})),
    "index names a lost tensor": edit_json(INDEX, lambda i: i["weight_map"].update({"model.lost.weight": SHARD})),
    "no index for shards": lambda p: (p / INDEX).unlink(),
    "no tensors at all": lambda p: [f.unlink() for f in p.glob("*.safetensors*")] and None,
    "NaN": _set(UP, torch.full((192, 128), torch.nan)),
    "infinity": _set(UP, torch.full((192, 128), torch.inf)),
    "FP8 without scales": _set(UP, torch.ones(192, 128).to(torch.float8_e4m3fn)),
    "quantised already": edit_config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "other method": edit_config(quantization_config={"quant_method": "awq", "bits": 4}),
    "FP8 per tensor": edit_config(quantization_config={"quant_method": "fp8"}),
    "FP8 odd block": edit_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128]}),
    "quantization_config is a list": edit_config(quantization_config=["nvfp4"]),
    "offsets not a list": edit_header(SHARD, lambda h: h[UP].update(data_offsets=4)),
    "header without dtype": edit_header(SHARD, lambda h: h[UP].pop("dtype")),
    "dtype unknown to safetensors": edit_header(SHARD, lambda h: h[UP].update(dtype="F2")),
    "shape too large": edit_header(SHARD, lambda h: h[UP].update(shape=[1 << 20, 1 << 20])),
}
for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool):
    DAMAGES[f"weight of {dtype}"] = _set(UP, torch.ones(192, 128).to(dtype))
for cut in range(0, 100, 2):
    DAMAGES[f"shard cut at {cut}%"] = edit_bytes(SHARD, lambda data, cut=cut: data[: len(data) * cut // 100])
for cut in (1, 3, 17, 100):
    DAMAGES[f"config cut by {cut}"] = edit_bytes("config.json", lambda data, cut=cut: data[:-cut])
    DAMAGES[f"index cut by {cut}"] = edit_bytes(INDEX, lambda data, cut=cut: data[:-cut])
for extra in (1, 8, 4096):
    DAMAGES[f"shard with {extra} bytes more"] = edit_bytes(SHARD, lambda data, extra=extra: data + b"x" * extra)
for seed in range(40):
    noise = random.Random(seed).randbytes(64)
    DAMAGES[f"noise {seed} in the header"] = edit_bytes(SHARD, lambda d, n=noise: d[:12] + n + d[76:])


@pytest.fixture(scope="module")
def pristine(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pristine") / "model"
    shutil.copytree(tiny, out)
    return out


@pytest.fixture
def damaged(pristine: Path, tmp_path: Path) -> Path:
    """A model to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def clear(message: str) -> None:
    assert 20 < len(message) < 600 and "Traceback" not in message and "Error(" not in message, message


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(damaged: Path, tmp_path: Path, name: str) -> None:
    DAMAGES[name](damaged)
    with pytest.raises(FourfoldError) as caught:
        convert(damaged, tmp_path / "out", Options(scales="absmax", importance="none"))
    clear(str(caught.value))
    assert not (tmp_path / "out").exists()


OPTIONS: dict[str, dict[str, Any]] = {
    "scales": {"scales": "best"},
    "format": {"format": "gguf"},
    "importance missing": {"importance": "/nonexistent/statistics"},
    "importance is a folder": {"importance": "/"},
    "calibration missing": {"calibration": Path("/nonexistent/text")},
    "calibration is a folder": {"calibration": Path("/")},
    "calibration and importance": {"calibration": Path("a"), "importance": "none"},
    "regular expression": {"ignore": ("(",)},
    "everything ignored": {"ignore": (".",)},
    "part of a fused layer": {"ignore": ("q_proj",), "importance": "none"},
    "gate without up": {"ignore": ("gate_proj",), "importance": "none"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(tiny: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(FourfoldError) as caught:
        convert(tiny, tmp_path / "out", Options(**OPTIONS[name]))
    clear(str(caught.value))
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be(tiny: Path, tmp_path: Path) -> None:
    fast = Options(scales="absmax", importance="none")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    for model, out in (
        (tiny, tmp_path / "there"),
        (tiny, tmp_path / "file" / "below"),
        (tiny, tiny / "inside"),
        (tmp_path / "nothing", tmp_path / "out"),
        (tmp_path / "file", tmp_path / "out"),
    ):
        with pytest.raises(FourfoldError) as caught:
            convert(model, out, fast)
        clear(str(caught.value))


BAD_VALUES: dict[str, list[Any]] = {
    "scales": ["best", "", 3, None, ["sweep"], "Sweep"],
    "scheme": ["w8a8", "", 4, None, {}, "W4A4"],
    "importance": [3, None, [], {}, True],
    "ignore": ["lm_head", [3], 7, None, ["("], {"a": 1}],
    "backend": [1, None, ["cpu"], {}],
}
UNKNOWN = ["scale", "schem", "Scales", "ignored", "back_end", "importances", "x", "", "quantization", "scales "]


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in BAD_VALUES.items() for v in values], ids=str)
def test_bad_setting_values(key: str, value: Any) -> None:
    with pytest.raises(FourfoldError) as caught:
        parse_settings({"quant": {key: value}}, "--additional-config fourfold")
    message = str(caught.value)
    clear(message)
    assert message.startswith("--additional-config fourfold: quant." + key)


@pytest.mark.parametrize(("where", "key"), list(itertools.product(("top", "quant"), UNKNOWN)), ids=str)
def test_unknown_settings_name_the_nearest(where: str, key: str) -> None:
    data = {key: 1} if where == "top" else {"quant": {key: 1}}
    with pytest.raises(FourfoldError) as caught:
        parse_settings(data, "FOURFOLD_CONFIG")
    assert f"unknown key {key!r}; " in str(caught.value)
    if where == "quant" and key == "scale":
        assert "did you mean 'scales'?" in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "x", 3, True, {"quant": None}, {"quant": []}, {"quant": "w4a4"}], ids=str)
def test_settings_of_another_shape(data: Any) -> None:
    with pytest.raises(FourfoldError) as caught:
        parse_settings(data, "FOURFOLD_CONFIG")
    clear(str(caught.value))


CONFIGS: list[dict[str, Any]] = [
    {"quant_method": "gptq"},
    {"quant_method": None, "bits": 4},
    {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": "modelopt", "quant_algo": None},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": "lm_head"},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [3]},
    {"quantization": {"quant_algo": "NVFP4_AWQ"}},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}}},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": None}}},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {}}},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_declarations_that_are_not_served(config: dict[str, Any]) -> None:
    with pytest.raises(FourfoldError) as caught:
        read_source(config)
    clear(str(caught.value))


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"{}"], ids=len
)
def test_damaged_statistics(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "statistics").write_bytes(content)
    with pytest.raises(FourfoldError) as caught:
        load_importance(tmp_path / "statistics")
    clear(str(caught.value))


def test_statistics_of_another_model(tiny: Path, tmp_path: Path) -> None:
    save_file({"model.layers.0.other.mean_square": torch.ones(128)}, tmp_path / "statistics")
    with pytest.raises(FourfoldError, match="have no layer of this model"):
        convert(tiny, tmp_path / "out", Options(importance=str(tmp_path / "statistics")))
    assert not (tmp_path / "out").exists()


def test_the_command_prints_one_line_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fourfold.common import cli

    for arguments in (["quantize", str(tmp_path), str(tmp_path / "out")], ["bench", "linear", "--shape", "a"]):
        with pytest.raises(SystemExit) as caught, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["fourfold", *arguments])
            cli.main()
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("fourfold: ") and "Traceback" not in error and len(error.splitlines()) == 1

"""Malformed checkpoints with an MTP head: each a clear error by the command, no traceback, nothing written."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damages import INDEX, Damage, edit_bytes, edit_config, edit_header, edit_json
from mtp_checkpoints import BY_NAME, HIDDEN, LAYERS, VOCABULARY, architecture, head, layer, model, target, write_model

from fourfold.common import cli

FIRST, MIDDLE, LAST = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
DAMAGES: dict[str, Damage] = {}


NORM = "model.layers.2.shared_head.norm.weight"
for file in ("config.json", INDEX):
    DAMAGES |= {
        f"{file} is a list": edit_json(file, lambda data: [1]),
        f"{file} is empty": edit_bytes(file, lambda data: b""),
        f"{file} is binary": edit_bytes(file, lambda data: b"\xff\xfe\x00"),
    }
    for cut in (1, 3, 17, 100):
        DAMAGES[f"{file} cut by {cut}"] = edit_bytes(file, lambda data, cut=cut: data[:-cut])
DAMAGES |= {
    "no config": lambda p: (p / "config.json").unlink(),
    "index without map": edit_json(INDEX, lambda i: {"metadata": {}}),
    "index map empty": edit_json(INDEX, lambda i: {"weight_map": {}}),
    "index map is a list": edit_json(INDEX, lambda i: {"weight_map": ["a"]}),
    "index leaves the folder": edit_json(INDEX, lambda i: i["weight_map"].update({NORM: "../x.safetensors"})),
    "index names a number": edit_json(INDEX, lambda i: i["weight_map"].update({NORM: 3})),
    "index names a lost tensor": edit_json(INDEX, lambda i: i["weight_map"].update({"model.lost.weight": LAST})),
    "index names another shard": edit_json(INDEX, lambda i: i["weight_map"].update({NORM: FIRST})),
    "index forgets a role": edit_json(INDEX, lambda i: i["weight_map"].pop(NORM) and None),
    "no index for shards": lambda p: (p / INDEX).unlink(),
    "no tensors at all": lambda p: [f.unlink() for f in p.glob("*.safetensors*")],
    "offsets not a list": edit_header(LAST, lambda h: h[NORM].update(data_offsets=4)),
    "header without dtype": edit_header(LAST, lambda h: h[NORM].pop("dtype")),
    "dtype unknown to safetensors": edit_header(LAST, lambda h: h[NORM].update(dtype="F2")),
    "shape too large": edit_header(LAST, lambda h: h[NORM].update(shape=[1 << 20, 1 << 20])),
    "shape of text": edit_header(LAST, lambda h: h[NORM].update(shape="64")),
}
for shard in (FIRST, MIDDLE, LAST):
    DAMAGES[f"{shard} missing"] = lambda p, shard=shard: (p / shard).unlink()
    for cut in range(0, 100, 10):
        DAMAGES[f"{shard} cut at {cut}%"] = edit_bytes(shard, lambda data, cut=cut: data[: len(data) * cut // 100])
for extra in (1, 8, 4096):
    DAMAGES[f"{extra} bytes more"] = edit_bytes(LAST, lambda data, extra=extra: data + b"x" * extra)
for seed in range(30):
    noise = random.Random(seed).randbytes(64)
    DAMAGES[f"noise {seed} in the header"] = edit_bytes(LAST, lambda d, n=noise: d[:12] + n + d[76:])
for key in ("num_hidden_layers", "hidden_size", "vocab_size", "architectures"):
    DAMAGES[f"config without {key}"] = edit_json("config.json", lambda c, key=key: c.pop(key) and None)
    for value in (0, -1, 2.5, "2", None, True, [], {}):
        DAMAGES[f"{key} is {value!r}"] = edit_config(**{key: value})
DAMAGES |= {
    "fewer layers than there are": edit_config(num_hidden_layers=1),
    "more layers than there are": edit_config(num_hidden_layers=9),
    "another hidden size": edit_config(hidden_size=HIDDEN * 2),
    "a larger vocabulary": edit_config(vocab_size=VOCABULARY + 1),
    "DeepSeek V4.1": edit_config(model_type="deepseek_v41"),
    "architectures of numbers": edit_config(architectures=[3]),
}
for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers"):
    for value in (-1, "1", [1], 1.0, True):
        DAMAGES[f"{key} is {value!r}"] = edit_config(**{key: value})
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
QUANTIZATION: list[Any] = [
    *("nvfp4", ["nvfp4"], 3, True),
    *({"quantization": []}, {"quantization": "NVFP4"}, {"config_groups": []}, {"config_groups": {"g": []}}),
    *({"config_groups": {"g": {"weights": 4}}}, {"config_groups": {"g": {"targets": "Linear"}}}),
    {"config_groups": {}, "ignore": "lm_head"},
    *({**MODELOPT, "ignore": "lm_head"}, {**MODELOPT, "ignore": [3]}, {**MODELOPT, "exclude_modules": {"a": 1}}),
    {**MODELOPT, "ignore": ["re:["]},
    *({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers} for layers in ([], {"a": []}, {"a": 1})),
    *({"quant_method": "fp8", "weight_block_size": block} for block in ([], [128], "128", [0, 128], ["a", "b"])),
    {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
    {"quant_method": "mxfp4", "modules_to_not_convert": [None]},
]
for value in QUANTIZATION:
    DAMAGES[f"quantization_config is {value!r}"] = edit_config(quantization_config=value)

ROLE_SHAPES = {"eh_proj": (HIDDEN, 2 * HIDDEN), "e_proj": (HIDDEN, HIDDEN), "h_proj": (HIDDEN, HIDDEN)}
ROLE_SHAPES |= {"head": (VOCABULARY, HIDDEN), "embedding": (VOCABULARY, HIDDEN)}


def _head(family: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """A checkpoint of ``family`` with a changed head in place of the model."""

    def damage(path: Path) -> None:
        found = BY_NAME[family]
        tensors = target() | head(found, found.prefixes[0])
        change(tensors)
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        write_model(path, tensors, {"architectures": [architecture(found)]})

    return damage


for family in ("deepseek_v3", "qwen3_next", "mimo", "deepseek_v4", "bailing_moe", "ernie4_5_moe"):
    found = BY_NAME[family]
    for role, template in found.roles.items():
        name = found.prefixes[0] + template.format(n=0, layer=LAYERS)
        shape = ROLE_SHAPES.get(role, (HIDDEN,))
        if role not in found.optional:
            DAMAGES[f"{family} without {role}"] = _head(family, lambda t, n=name: t.pop(f"{n}.weight"))
            DAMAGES[f"{family}: only a bias of {role}"] = _head(
                family, lambda t, n=name: t.update({f"{n}.bias": t.pop(f"{n}.weight")})
            )
        wrong = {"half": (*shape[:-1], shape[-1] // 2), "turned": shape[::-1], "3-D": (1, *shape), "scalar": ()}
        for kind, changed in wrong.items():
            if changed != shape:
                DAMAGES[f"{family}: {role} {kind}"] = _head(
                    family, lambda t, n=name, s=changed: t.update({f"{n}.weight": ("BF16", s)})
                )
        for dtype in ("BF16" if role == "vocabulary" else "I32", "U8", "BOOL", "F8_E4M3"):
            DAMAGES[f"{family}: {role} of {dtype}"] = _head(
                family, lambda t, n=name, d=dtype, s=shape: t.update({f"{n}.weight": (d, s)})
            )
    block = found.prefixes[0] + found.block.format(n=0, layer=LAYERS)
    q_proj = f"{block}.self_attn.q_proj"
    for format in ("fp8_block", "fp8_tensor", "mxfp8", "mxfp4", "nvfp4_modelopt", "nvfp4_compressed"):
        parts = layer(q_proj, (HIDDEN, HIDDEN), format)
        for lost in parts:
            if not lost.endswith("input_scale"):
                DAMAGES[f"{family}: {format} without {lost.rpartition('.')[2]}"] = _head(
                    family,
                    lambda t, q=q_proj, p=parts, lost=lost: (
                        t.pop(f"{q}.weight"),
                        t.update({name: place for name, place in p.items() if name != lost}),
                    ),
                )
    DAMAGES[f"{family} without a decoder layer"] = _head(
        family,
        lambda t, b=block: [
            t.pop(n) for n in list(t) if n.startswith((f"{b}.self", f"{b}.mlp", f"{b}.input", f"{b}.post"))
        ],
    )
    DAMAGES[f"{family} without an expert"] = _head(
        family, lambda t, b=block: t.pop(f"{b}.mlp.experts.0.up_proj.weight")
    )


def test_there_are_many() -> None:
    assert len(DAMAGES) >= 400


@pytest.mark.parametrize("name", DAMAGES)
def test_the_command_says_what_is_wrong(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = model(tmp_path / "model", "deepseek_v3", shards=3), tmp_path / "out"
    DAMAGES[name](path)
    for arguments in (["inspect", str(path)], ["inspect", str(path), "--json"], ["extract", str(path), str(out)]):
        with pytest.raises(SystemExit) as caught, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["fourfold", "mtp", *arguments])
            cli.main()
        printed = capsys.readouterr()
        assert caught.value.code == 2 and printed.out == ""
        assert printed.err.startswith("fourfold: ") and len(printed.err.splitlines()) == 1
        assert "Traceback" not in printed.err and len(printed.err) > 30
    assert [file.name for file in tmp_path.iterdir()] == ["model"]

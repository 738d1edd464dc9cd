"""``fourfold mtp``: the draft directories that it writes, and what it prints."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mtp_checkpoints import BY_NAME, HIDDEN, LAYERS, Tensors, architecture, head, layer, model, target, write_model
from safetensors import safe_open

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp import command
from fourfold.common.mtp.engines import check_engine, launch_flags
from fourfold.common.mtp.extract import extract
from fourfold.common.mtp.head import KEY, MtpHead
from fourfold.common.mtp.layouts import FAMILIES
from fourfold.common.mtp.reader import read_head

INDEX = "model.safetensors.index.json"
COMPUTED = [family for family in FAMILIES if not family.limits]
LIMITED = [family for family in FAMILIES if family.limits]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def draft(tmp_path: Path, tensors: Tensors, family: str = "deepseek_v3", engine: Any = "vllm", **config: Any) -> Path:
    path = write_model(tmp_path / "model", tensors, {"architectures": [architecture(BY_NAME[family])], **config})
    extract(path, tmp_path / "out", engine)
    return tmp_path / "out"


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("family", COMPUTED, ids=lambda family: family.name)
def test_a_draft_directory_of_every_family(family: Any, shards: int, tmp_path: Path) -> None:
    path, out = model(tmp_path / "model", family.name, shards), tmp_path / "new" / "out"
    reading = extract(path, out, "vllm")
    config, index = read(out / "config.json"), read(out / INDEX)
    assert config["architectures"] == ["FourfoldMTP"] and config["model_type"] == "mtp"
    assert config["n_predict"] == config["num_nextn_predict_layers"] == 1 and "quantization_config" not in config
    assert config["target_architecture"] == architecture(family) and config["target_model_type"] == "some"
    assert config["num_hidden_layers"] == LAYERS and config["hidden_size"] == HIDDEN
    assert MtpHead.from_config(config[KEY]) == reading.head
    own = head(family, family.prefixes[0])
    assert set(index["weight_map"]) == set(own)
    for name, shard in index["weight_map"].items():
        with safe_open(out / shard, "np") as file:
            assert tuple(file.get_slice(name).get_shape()) == own[name][1]
    links = [file for file in out.iterdir() if file.suffix == ".safetensors"]
    assert {file.name for file in links} == set(index["weight_map"].values())
    assert len(links) < shards or shards == 1
    for link in links:
        assert link.is_symlink() and not os.path.isabs(os.readlink(link))
        assert link.resolve() == (path / link.name).resolve()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == path.stat().st_mode & 0o777
    again = read_head(out)
    assert again.head == reading.head and again.findings == ()


def test_the_size_in_the_index_is_that_of_the_head(tmp_path: Path) -> None:
    out = draft(tmp_path, target() | head(BY_NAME["mimo"], "model."), "mimo")
    own = head(BY_NAME["mimo"], "model.")  # BF16
    total = sum(2 * math.prod(shape) for _, shape in own.values())
    assert read(out / INDEX)["metadata"] == {"total_size": total}


def test_links_hold_when_model_and_draft_move_together(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    model(tmp_path / "old" / "model", "mimo", 2)
    extract(tmp_path / "old" / "model", tmp_path / "old" / "out", "vllm")
    (tmp_path / "old").rename(tmp_path / "moved")
    assert read_head(tmp_path / "moved" / "out").family.name == "mimo"


def test_links_of_links_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model(tmp_path / "store" / "blobs", "mimo", 2)
    (tmp_path / "snapshot").mkdir()
    for file in path.iterdir():  # as the hub's cache lies on disk
        (tmp_path / "snapshot" / file.name).symlink_to(f"../store/blobs/{file.name}")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "here").symlink_to("deep/er")
    monkeypatch.chdir(tmp_path)
    extract(Path("snapshot"), Path("here/out"), "sglang")
    assert read_head(tmp_path / "deep" / "er" / "out").family.name == "mimo"


def test_vllm_tells_mla_by_the_model_type_and_sglang_by_a_second_class(tmp_path: Path) -> None:
    path = model(tmp_path / "model", "deepseek_v3", kv_lora_rank=16, model_type="deepseek_v3")
    own = ["FourfoldMTP"]
    for engine, *expected in (
        ("vllm", "deepseek_mtp", own),
        ("sglang", "deepseek_v3", [*own, "DeepseekV3ForCausalLMNextN"]),
    ):
        extract(path, tmp_path / engine, check_engine(engine))
        config = read(tmp_path / engine / "config.json")
        assert [config["model_type"], config["architectures"]] == expected


def test_the_config_of_a_multimodal_model_is_that_of_its_text(tmp_path: Path) -> None:
    family = BY_NAME["qwen3_next"]
    text = {"model_type": "text", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "vocab_size": 256}
    config = {"model_type": "outer", "text_config": text, "vision_config": {}, "dtype": "bfloat16"}
    out = draft(tmp_path, target() | head(family, "mtp."), "qwen3_next", "sglang", **config)
    found = read(out / "config.json")
    assert found["model_type"] == "text" and found["dtype"] == "bfloat16" and "vision_config" not in found


PLAIN_LAYERS = ["lm_head", *(f"model.layers.2.{name}" for name in ("eh_proj", "embedding", "head", "mlp.gate"))]
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "fp8_block": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "modules_to_not_convert",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "fp8_tensor": ({}, "modules_to_not_convert", {"quant_method": "fp8", "activation_scheme": "static"}),
    "nvfp4_modelopt": ({}, "ignore", {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}),
    "nvfp4_compressed": (
        {
            "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}}},
            "format": "f",
        },
        "ignore",
        {
            "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}}},
            "format": "f",
        },
    ),
}


@pytest.mark.parametrize("format", CASES)
def test_the_config_declares_what_the_tensors_are(format: str, tmp_path: Path) -> None:
    declared, key, expected = CASES[format]
    config = {"quantization_config": declared} if declared else {}
    out = draft(tmp_path, target() | head(BY_NAME["deepseek_v3"], "model.", format=format), **config)
    assert read(out / "config.json")["quantization_config"] == {**expected, key: PLAIN_LAYERS}
    assert read_head(out).contradictions == ()


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}])
def test_an_unquantised_head_of_a_quantised_model(config: dict[str, Any], tmp_path: Path) -> None:
    out = draft(tmp_path, target("nvfp4_modelopt") | head(BY_NAME["glm4_moe"], "model."), "glm4_moe", **config)
    assert "quantization_config" not in read(out / "config.json")


def test_layers_are_ignored_under_the_names_of_the_generic_class(tmp_path: Path) -> None:
    tensors = head(BY_NAME["qwen3_next"], "mtp.", format="nvfp4_modelopt")
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
    for e in (0, 1):
        for part in ("gate", "up", "down"):
            tensors |= layer(f"mtp.layers.0.mlp.experts.{e}.{part}_proj", (128, 128))
    ignore = read(draft(tmp_path, tensors, "qwen3_next") / "config.json")["quantization_config"]["ignore"]
    assert {"model.layers.2.eh_proj", "model.layers.2.mlp.experts", "model.layers.2.mlp.experts.1.up_proj"} <= set(
        ignore
    )


def test_formats_that_no_config_can_declare(tmp_path: Path) -> None:
    tensors = target() | head(BY_NAME["deepseek_v3"], "model.", format="fp8_block")
    name = "model.layers.2.self_attn.q_proj"
    two = {n: p for n, p in tensors.items() if not n.startswith(name)} | layer(name, (HIDDEN, HIDDEN), "nvfp4_modelopt")
    for i, (found, text) in enumerate(
        (
            (two, "layers are fp8_block and nvfp4_modelopt"),
            (head(BY_NAME["mimo"], "model.", format="mxfp8"), "are mxfp8"),
        )
    ):
        with pytest.raises(FourfoldError, match=text):
            draft(tmp_path / str(i), found, "deepseek_v3" if i == 0 else "mimo")
        assert not (tmp_path / str(i) / "out").exists()


@pytest.mark.parametrize("family", LIMITED, ids=lambda family: family.name)
def test_heads_that_the_generic_class_does_not_compute(family: Any, tmp_path: Path) -> None:
    with pytest.raises(FourfoldError) as caught:
        extract(model(tmp_path / "model", family.name), tmp_path / "out", "vllm")
    text = str(caught.value)
    assert f"FourfoldMTP does not compute the head of {tmp_path / 'model'} ({family.name}): {family.limits}" in text
    assert "serve it with the engine's own class, vllm: --speculative-config" in text
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    path = model(tmp_path / "model", "mimo")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "folder", "dangling", "model"):
        with pytest.raises(FourfoldError, match=f"{name} exists; give a directory that does not exist yet"):
            extract(path, tmp_path / name, "vllm")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model(tmp_path / "model", "mimo", 3)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FourfoldError, match="cannot be written"):
        extract(path, tmp_path / "file" / "out", "vllm")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for attribute in ("symlink_to", "rename", "write_text"):
        with pytest.raises(FourfoldError, match="cannot be written: .*No space left"), monkeypatch.context() as patch:
            patch.setattr(Path, attribute, full)
            extract(path, tmp_path / "out", "vllm")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "model"]


def test_only_two_engines(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="--engine 'trt': expected one of vllm, sglang"):
        command.extract(model(tmp_path / "model", "mimo"), tmp_path / "out", "trt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("modules", "own", "several"), [(1, False, False), (2, False, True), (2, True, False)])
def test_sglang_gets_a_draft_model_for_each_module(modules: int, own: bool, several: bool, tmp_path: Path) -> None:
    family = BY_NAME["mimo"]
    tensors = target() | head(family, family.prefixes[0], modules)
    reading = read_head(write_model(tmp_path / "model", tensors, {"architectures": [architecture(family)]}))
    flags = shlex.split(launch_flags(reading, "sglang", tmp_path / "out", own))
    assert flags[flags.index("--speculative-num-steps") + 1] == str(modules)
    assert ("--enable-multi-layer-eagle" in flags) == several


def fourfold(*arguments: Any) -> str:
    tool = Path(sys.executable).parent / "fourfold"
    done = subprocess.run([tool, "mtp", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_inspect_prints_what_extract_needs(tmp_path: Path) -> None:
    path = model(tmp_path / "model", "transformers")
    facts = json.loads(fourfold("inspect", path, "--json"))
    assert facts["head"] == json.loads(json.dumps(read_head(path).head.to_config()))
    assert facts["formula"].startswith("h = block(eh_proj([enorm(embedding) ; hnorm(hidden)])); logits = head(norm(h))")
    text = fourfold("inspect", path)
    for part in (
        "family: transformers, 1 module(s) after 2 layers",
        "  eh_proj: mtp.layers.0.eh_proj",
        "  bf16: self_attn",
    ):
        assert part in text
    assert "finding: nobody has checked that a SomeForCausalLM computes its head as transformers does" in text
    for engine in ("vllm", "sglang"):
        served = facts["engines"][engine]
        assert served["class"] == "FourfoldMTP" and f"\n{engine}: FourfoldMTP\n" in text
        run, flags = (shlex.split(line) for line in served["commands"])
        assert run[:3] == ["fourfold", "mtp", "extract"] and run[-2:] == ["--engine", engine]
        out = tmp_path / engine
        assert "tensors of transformers, none copied" in fourfold(*run[2:4], out, *run[5:])
        if engine == "vllm":
            options = {"method": "mtp", "num_speculative_tokens": 1, "model": "model-mtp"}
            assert flags[0] == "--speculative-config" and json.loads(flags[1]) == options
        else:
            assert flags[:4] == ["--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", "model-mtp"]
        own = json.loads(fourfold("inspect", out, "--json"))["engines"][engine]
        assert own["class"] == "FourfoldMTP" and len(own["commands"]) == 1 and str(out) in own["commands"][0]


def test_inspect_of_a_model_that_the_engines_serve(tmp_path: Path) -> None:
    facts = json.loads(fourfold("inspect", model(tmp_path / "a", "deepseek_v4"), "--json"))
    assert facts["engines"]["vllm"]["class"] == "DeepSeekV4MTPModel"
    assert facts["engines"]["sglang"]["class"] == "DeepseekV4ForCausalLMNextN"
    assert [len(served["commands"]) for served in facts["engines"].values()] == [1, 1]
    assert "e_proj(enorm(embedding where position > 0)) + h_proj(hnorm(hidden))" in facts["formula"]
    text = fourfold("inspect", model(tmp_path / "b", "minimax_m3"))
    assert "limits: fourfold's generic head does not compute it: its decoder layer is sparse" in text
    assert "vllm: MiniMaxM3MTP" in text and "sglang: no class" in text


def test_a_head_that_the_config_is_wrong_about_can_be_served_by_what_it_is(tmp_path: Path) -> None:
    family = BY_NAME["deepseek_v3"]
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}}
    tensors = target("nvfp4_modelopt") | head(family, "model.")
    path = write_model(tmp_path / "model", tensors, {"architectures": [architecture(family)], **config})
    facts = json.loads(fourfold("inspect", path, "--json"))
    (line,) = facts["contradictions"]
    assert "10 layers are stored as bf16, but quantization_config declares nvfp4_modelopt: model.layers.2." in line
    served = facts["engines"]["vllm"]
    assert served["class"] == "DeepSeekMTPModel" and len(served["commands"]) == 1
    assert served["instead"][0] == f"fourfold mtp extract {path} model-mtp --engine vllm"
    text = fourfold("inspect", path)
    assert f"contradiction: {line}" in text and f"or, by what the tensors are: {served['instead'][0]}" in text


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_transformers_reads_the_config_for_sglang(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    shape = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "vocab_size": 256}
    config = json.loads(AutoConfig.for_model(name, **shape).to_json_string(use_diff=False))
    path = model(tmp_path / "model", name, **{**config, "architectures": [architecture(BY_NAME[name])]})
    reading = extract(path, tmp_path / "out", "sglang")
    found = AutoConfig.from_pretrained(tmp_path / "out")
    assert found.model_type == name and found.architectures[0] == "FourfoldMTP"
    assert MtpHead.from_config(getattr(found, KEY)) == reading.head
    assert found.num_nextn_predict_layers == 1 and found.num_hidden_layers == LAYERS


def test_reading_a_head_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from fourfold.common import cli; cli.main()"
    hook = (
        "import atexit, sys; atexit.register(lambda: print([n for n in ('torch', 'transformers') if n in sys.modules]))"
    )
    command = [
        sys.executable,
        "-c",
        f"{hook}; {code}",
        "mtp",
        "extract",
        str(model(tmp_path / "m", "mimo")),
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

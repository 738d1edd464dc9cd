"""``fourfold quantize``: what it writes, in both vocabularies, and what else reads it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourfold.common.errors import FourfoldError
from fourfold.common.quant.backends import Scheme
from fourfold.common.quant.checkpoint import calibrate, vocabulary
from fourfold.common.quant.checkpoint.convert import Options, convert
from fourfold.common.quant.checkpoint.layers import choose, fused_with
from fourfold.common.quant.checkpoint.reader import Checkpoint
from fourfold.common.quant.importance import FILE, Collector, load_importance, statistics_of
from fourfold.common.quant.source import Layout, read_source

FAST = Options(scales="absmax", importance="none")


@pytest.mark.parametrize("format", vocabulary.FORMATS)
@pytest.mark.parametrize("scheme", list(Scheme))
def test_round_trip(tiny: Path, tmp_path: Path, format: str, scheme: Scheme) -> None:
    importance = "none" if scheme is Scheme.W4A16 else "random"
    report = convert(tiny, tmp_path / "out", Options("absmax", importance, None, format, scheme))
    assert len(report.choice.quantised) == 14 and set(report.choice.kept) == {"model.embed_tokens", "lm_head"}
    made, source = Checkpoint(tmp_path / "out"), Checkpoint(tiny)
    declared = read_source(made.config["quantization_config"])
    layout = vocabulary.FORMATS[format][0]
    assert declared.layout is layout and declared.is_nvfp4
    assert declared.scheme_of("lm_head") is None
    assert made.shards == source.shards and len(made.shards) == 3
    for name in report.choice.quantised:
        assert declared.scheme_of(name) is scheme
        weight, input_scale = vocabulary.read_layer(made, name, layout)
        original = source.tensor(f"{name}.weight").float()
        assert float((weight.dequantize() - original).norm() / original.norm()) < 0.12
        assert (input_scale is None) is (scheme is Scheme.W4A16)
        for other in fused_with(name):  # stock engines use one global scale for a fused layer
            twin, other_scale = vocabulary.read_layer(made, other, layout)
            assert torch.equal(twin.global_scale, weight.global_scale)
            assert input_scale is None or torch.equal(input_scale, other_scale)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(made.tensor(name), source.tensor(name))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "out" / made.shards[0]).stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_transformers_with_compressed_tensors_generates_from_it(smollm2_nvfp4: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_nvfp4, dtype=torch.bfloat16)
    made = Checkpoint(smollm2_nvfp4)
    name = "model.layers.7.mlp.down_proj"
    ours = vocabulary.read_layer(made, name, Layout.COMPRESSED_TENSORS)[0].dequantize()
    module = model.get_submodule(name)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_nvfp4)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    x = torch.randn(3, ours.shape[1]).to(torch.bfloat16)
    torch.testing.assert_close(module(x).float(), x.float() @ ours.t(), rtol=2e-2, atol=5e-2)


def test_fp8_block_scales_as_source(tiny: Path, tmp_path: Path) -> None:
    source, target = Checkpoint(tiny), tmp_path / "fp8"
    target.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name in source.entries:
        tensor = source.tensor(name)
        if "proj" not in name:
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        scales = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
        spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        tensors[name] = (tensor.float() / spread).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scales
    save_file(tensors, target / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (target / "config.json").write_text(json.dumps(source.config | {"quantization_config": quantization}))
    report = convert(target, tmp_path / "out", Options(ignore=("layers.0.mlp",)))
    made = Checkpoint(tmp_path / "out")
    assert len(report.choice.quantised) == 11
    for name in report.choice.quantised:
        weight = vocabulary.read_layer(made, name, Layout.COMPRESSED_TENSORS)[0].dequantize()
        original = source.tensor(f"{name}.weight").float()
        assert float((weight - original).norm() / original.norm()) < 0.13
    kept = made.tensor("model.layers.0.mlp.up_proj.weight")
    assert kept.dtype == torch.bfloat16 and not [name for name in made.entries if name.endswith("_scale_inv")]
    assert "model.layers.0.mlp.up_proj" in made.config["quantization_config"]["ignore"]


def test_statistics_streamed_equal_those_of_the_whole_model(cut: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(cut)
    names = choose(checkpoint, read_source(None), ()).quantised
    tokens, origin = calibrate.calibration_tokens(checkpoint, None)
    streamed, unseen = calibrate.collect(checkpoint, names, tokens, origin)
    assert origin == "random tokens" and not unseen and set(streamed.mean_square) == set(names)
    whole = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32)
    expected = statistics_of(whole, {n: whole.get_submodule(n) for n in names}, tokens)
    for name in names:
        torch.testing.assert_close(streamed.mean_square[name], expected[name], rtol=1e-3, atol=1e-7)
        assert bool((streamed.amax[name] ** 2 >= streamed.mean_square[name] * 0.999).all())


def test_statistics_from_text_are_saved_and_can_be_used_again(cut: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    convert(cut, tmp_path / "first", Options(calibration=text))
    saved = load_importance(tmp_path / "first" / FILE)
    assert saved.origin.startswith("text text.txt")
    convert(cut, tmp_path / "second", Options(importance=str(tmp_path / "first" / FILE)))
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


def test_experts_without_tokens_take_the_mean_of_their_siblings() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{e}.up_proj" for layer in (0, 1) for e in range(3)]
    layers = {name: torch.nn.Linear(4, 4) for name in names}
    with Collector(layers) as collector:
        layers[names[0]](torch.full((2, 4), 1.0))
        layers[names[1]](torch.full((2, 4), 3.0))
        layers[names[3]](torch.full((2, 4), 100.0))
        layers[names[4]](torch.zeros(0, 4))
    found, unseen = collector.result("test")
    assert unseen == [names[2], names[4], names[5]]
    assert found.mean_square[names[2]].tolist() == [5.0] * 4
    assert found.mean_square[names[4]].tolist() == [1e4] * 4


def test_weighted_scales_lower_the_weighted_error(smollm2: Path, smollm2_nvfp4: Path, tmp_path: Path) -> None:
    convert(smollm2, tmp_path / "absmax", FAST)
    statistics = load_importance(smollm2_nvfp4 / FILE).mean_square
    original = Checkpoint(smollm2)

    def loss(path: Path, name: str) -> float:
        weight = vocabulary.read_layer(Checkpoint(path), name, Layout.COMPRESSED_TENSORS)[0].dequantize()
        return float(((weight - original.tensor(f"{name}.weight").float()).square() * statistics[name]).sum())

    for name in ("model.layers.2.self_attn.q_proj", "model.layers.15.mlp.up_proj"):
        assert loss(smollm2_nvfp4, name) < 0.7 * loss(tmp_path / "absmax", name)


def test_gptq_lowers_the_error_of_the_outputs_and_resumes(cut: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text((Path(json.__file__).parent / "decoder.py").read_text())
    with pytest.raises(FourfoldError, match="--gptq needs the activations of real text"):
        convert(cut, tmp_path / "none", Options(gptq=True))
    seen: dict[str, torch.Tensor] = {}
    ignore = ("layers[.]1",)
    layers = choose(Checkpoint(cut), read_source(None), ignore).quantised
    tokens, _ = calibrate.calibration_tokens(Checkpoint(cut), text)
    calibrate.collect(Checkpoint(cut), layers, tokens, "", visit=seen.__setitem__)
    errors = {}
    for gptq in (False, True):
        report = convert(cut, tmp_path / str(gptq), Options(calibration=text, ignore=ignore, gptq=gptq))
        assert report.fed == (len(layers) if gptq else 0) and not (tmp_path / str(gptq) / "gptq").exists()
        made, total = Checkpoint(tmp_path / str(gptq)), 0.0
        for name in layers:
            weight = vocabulary.read_layer(made, name, Layout.COMPRESSED_TENSORS)[0].dequantize()
            original = Checkpoint(cut).tensor(f"{name}.weight").float()
            total += float(((weight - original) @ seen[name].t()).norm() / (original @ seen[name].t()).norm())
        errors[gptq] = total / len(layers)
    assert errors[True] < 0.9 * errors[False], errors
    # A run killed after the layers were fed back goes on with them.
    fed = tmp_path / "again.partial" / "gptq"

    def stop(text: str, done: float) -> None:
        if fed.is_dir() and len(list(fed.iterdir())) == len(layers):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(cut, tmp_path / "again", Options(calibration=text, ignore=ignore, gptq=True), stop)
    before = {path.name: path.stat().st_mtime_ns for path in fed.iterdir()}
    finished: list[dict[str, int]] = []
    convert(
        cut,
        tmp_path / "again",
        Options(calibration=text, ignore=ignore, gptq=True),
        lambda *_: finished.append({path.name: path.stat().st_mtime_ns for path in fed.iterdir()}),
    )
    assert len(before) == len(layers) and finished[-1] == before
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "True" / "model.safetensors").keys()
    )


def test_a_killed_run_leaves_nothing_and_resumes(tiny: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "out", tmp_path / "out.partial"
    slow = f"""
import signal, os, pathlib
from fourfold.common.quant.checkpoint import convert as module
write = module.write_tensors
def write_and_die(path, tensors, metadata):
    write(path, tensors, metadata)
    if path.name.endswith("00002-of-00003.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
module.write_tensors = write_and_die
module.convert(pathlib.Path({str(tiny)!r}), pathlib.Path({str(out)!r}), module.Options("absmax", "none"))
"""
    done = subprocess.run([sys.executable, "-c", slow], capture_output=True)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    shards = sorted(part.glob("*.safetensors"))
    assert len(shards) == 2
    before = [shard.stat().st_mtime_ns for shard in shards]
    convert(tiny, out, FAST)
    assert [(out / shard.name).stat().st_mtime_ns for shard in shards] == before
    convert(tiny, tmp_path / "again", FAST)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


def test_a_resumed_run_with_other_options_starts_over(tiny: Path, tmp_path: Path) -> None:
    part = tmp_path / "out.partial"
    part.mkdir()
    (part / "model-00001-of-00003.safetensors").write_bytes(b"of another run")
    convert(tiny, tmp_path / "out", FAST)
    Checkpoint(tmp_path / "out")


def test_two_runs_do_not_write_the_same_output(tiny: Path, tmp_path: Path) -> None:
    import fcntl

    part = tmp_path / "out.partial"
    part.mkdir()
    with (part / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FourfoldError, match="another run is writing"):
            convert(tiny, tmp_path / "out", FAST)


def test_peak_memory_is_about_one_shard(tmp_path: Path, smollm2: Path) -> None:
    from fourfold.common.demo.model import synthetic_llama

    source = tmp_path / "model"
    source.mkdir()
    shape = {"hidden": 1024, "layers": 8, "intermediate": 4096, "heads": 8, "kv_heads": 8, "vocabulary": 1024}
    synthetic_llama(source, **shape)
    code = """
import resource, sys, pathlib
from fourfold.common.quant.checkpoint.convert import convert, Options
from fourfold.common.quant.quantizer import quantize_weight
import torch
quantize_weight(torch.randn(64, 64), name="warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), Options(importance="none"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sizes = [p.stat().st_size for p in source.glob("*.safetensors")]
    assert int(done.stdout) < 2.5 * max(sizes) < 0.4 * sum(sizes)


def test_command_reports_what_it_did(tiny: Path, tmp_path: Path) -> None:
    fourfold = Path(sys.executable).parent / "fourfold"
    command = [fourfold, "quantize", str(tiny), str(tmp_path / "out"), "--importance", "none", "--ignore", "layers.0"]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7 layers in NVFP4 (w4a16, compressed-tensors, scales sweep)" in done.stdout
    assert "kept in its dtype: q_proj (1): ignored by --ignore" in done.stdout
    assert "kept in its dtype: lm_head (1): the output head" in done.stdout
    assert time.monotonic() - begin < 120

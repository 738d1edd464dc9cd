"""What a user would pick instead of fourfold on a CPU, made from the same model for `bench engine`.

The engine's own INT4 reads a compressed-tensors ``pack-quantized`` checkpoint (symmetric, group 128), written
here. llama.cpp is measured with its own tools where the user has them. Round-to-nearest is enough: speed is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fourfold.common.errors import FourfoldError
from fourfold.common.settings import cache_dir

GROUP = 128
LLAMA_KINDS = ("BF16", "Q8_0", "Q4_0", "NVFP4")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_projection(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer inside the decoder."""
    return name.endswith(".weight") and name.split(".")[-2] in _PROJECTIONS


def headers(model: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield name and shape of every tensor."""
    from safetensors import safe_open

    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_slice(name).get_shape()


def int4_checkpoint(model: Path) -> Path:
    """Write (once) the INT4 checkpoint of ``model`` in the cache and return its folder.

    Raises:
        FourfoldError: an inner dimension is no multiple of 128.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    out = cache_dir() / "bench" / f"{model.name}-int4-g{GROUP}"
    if out.exists():
        return out
    for name, shape in headers(model):
        if is_projection(name) and shape[1] % GROUP:
            raise FourfoldError(f"{name}: inner dimension {shape[1]} is no multiple of the group, {GROUP}")
    part = out.with_suffix(".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for shard in sorted(model.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(shard, "pt") as source:
            for name in source.keys():  # noqa: SIM118
                weight = source.get_tensor(name)
                if not is_projection(name):
                    tensors[name] = weight
                    continue
                rows, columns = weight.shape
                groups = weight.float().view(rows, -1, GROUP)
                scale = (groups.abs().amax(-1, keepdim=True) / 7.5).clamp(min=1e-8)
                codes = (groups / scale).round_().clamp_(-8, 7).view(rows, columns // 8, 8).to(torch.int32) + 8
                packed = (codes << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)
                base = name.removesuffix(".weight")
                tensors[f"{base}.weight_packed"] = packed
                tensors[f"{base}.weight_scale"] = scale.squeeze(-1).to(weight.dtype)
                tensors[f"{base}.weight_shape"] = torch.tensor([rows, columns], dtype=torch.int64)
        save_file(tensors, part / shard.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
    if len(set(weight_map.values())) > 1:
        (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((model / "config.json").read_text())
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    (part / "config.json").write_text(json.dumps(config, indent=1))
    for other in model.iterdir():
        if other.is_file() and other.suffix != ".safetensors" and not (part / other.name).exists():
            if other.name != "model.safetensors.index.json":
                shutil.copy2(other, part)
    part.rename(out)
    return out


def _tool(folder: Path, name: str) -> Path:
    for place in (folder / name, folder / "bin" / name):
        if place.is_file():
            return place.resolve()
    raise FourfoldError(f"{name} is not in {folder} or its bin/; build llama.cpp's tools there")


def _run(command: list[str | Path]) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise FourfoldError(f"{Path(command[0]).name} failed: {(result.stderr or result.stdout)[-1500:]}")
    return result.stdout


def _nvfp4_checkpoint(model: Path) -> Path:
    """The ModelOpt NVFP4 checkpoint of ``model``, which llama.cpp's converter reads."""
    from fourfold.common.quant.checkpoint.convert import Options, convert

    out = cache_dir() / "bench" / f"{model.name}-modelopt"
    if not out.exists():
        convert(model, out, Options(scales="absmax", format="modelopt"))
    return out


def _gguf(folder: Path, model: Path, kind: str) -> Path:
    """The GGUF file of ``model`` in llama.cpp's format ``kind``, made once in the cache by llama.cpp's own tools."""
    made = cache_dir() / "bench" / f"{model.name}-{kind.lower()}.gguf"
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    part = made.with_suffix(".partial")
    if kind in ("BF16", "NVFP4"):
        source = model if kind == "BF16" else _nvfp4_checkpoint(model)
        converter = _tool(folder, "convert_hf_to_gguf.py")
        _run([sys.executable, converter, source, "--outfile", part, "--outtype", "bf16"])
    else:
        _run([_tool(folder, "llama-quantize"), _gguf(folder, model, "BF16"), part, kind])
    part.rename(made)
    return made


def llama_cpp_speed(folder: Path, model: Path, kind: str, batches: list[int], tokens: int) -> dict[int, float]:
    """Decode tokens a second of llama.cpp for each batch, by its own ``llama-batched-bench``.

    Raises:
        FourfoldError: a tool is missing or fails.
    """
    bench, made = _tool(folder, "llama-batched-bench"), _gguf(folder, model, kind)
    threads = len(os.sched_getaffinity(0))
    sizes = ",".join(map(str, batches))
    length = max(batches) * (tokens + 32)
    command: list[str | Path] = [bench, "-m", made, "-c", str(length), "-npp", "16", "-ntg", str(tokens)]
    output = _run([*command, "-npl", sizes, "-t", str(threads), "--output-format", "jsonl"])
    speeds: dict[int, float] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            speeds[int(entry["pl"])] = float(entry["speed_tg"])
    return speeds

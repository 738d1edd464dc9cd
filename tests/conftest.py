"""Models shared by all tests. Each is made once below the cache directory and only read by the tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourfold.common.demo.model import resolve, synthetic_llama
from fourfold.common.demo.serve import quantised

TINY = {"hidden": 128, "layers": 2, "intermediate": 192, "heads": 4, "kv_heads": 2, "vocabulary": 49152}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in BF16."""
    return resolve("smollm2")


@pytest.fixture(scope="session")
def smollm2_nvfp4(smollm2: Path) -> Path:
    """The same as ``fourfold quantize`` writes it by default."""
    return quantised(smollm2)


@pytest.fixture(scope="session")
def cut(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of SmolLM2 with its embeddings, for what need not make sense."""
    from safetensors.torch import load_file, save_file

    out = tmp_path_factory.mktemp("cut")
    tensors = load_file(smollm2 / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if ".layers." not in n or int(n.split(".layers.")[1].split(".")[0]) < 2}
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    config = json.loads((smollm2 / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (out / name).write_bytes((smollm2 / name).read_bytes())
    return out


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers in three shards."""
    return synthetic_llama(tmp_path_factory.mktemp("tiny"), **TINY, tokenizer=smollm2)


@pytest.fixture(scope="session")
def tiny_bias(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of two layers, whose q, k and v have biases."""
    return synthetic_llama(tmp_path_factory.mktemp("tiny-bias"), **TINY, tokenizer=smollm2, bias=True)

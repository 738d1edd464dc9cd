"""What both engines are held to, against one plain PyTorch run of the same weights.

`QUESTIONS` go to the server through the OpenAI client, greedily. The reference multiplies the dequantised weights in
PyTorch, in float32, and follows the server's tokens. The server works in bfloat16 with int8 activations, so logprobs
agree within `MEAN` and `WORST`; where its token is not the reference's first, the two candidates are a near-tie.
Measured on SmolLM2 with vLLM 0.32: mean 0.029, worst 0.27, widest gap 0.33; int16 activations 0.022, 0.19, 0.18;
vLLM's own BF16 against BF16 weights in float32 0.022, 0.31, 0.23, so most of it is bfloat16.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fourfold.common.quant.checkpoint import vocabulary
from fourfold.common.quant.checkpoint.reader import Checkpoint
from fourfold.common.quant.source import Layout, read_source
from fourfold.common.serving import EngineServer

OUTPUTS = Path(__file__).parents[1] / "build" / "engine_outputs"
TOKENS = 64
MEAN, WORST = 0.04, 0.6  # nats, of the chosen tokens' logprobs
NEAR_TIE = 0.5  # nats between the reference's first token and the one chosen

QUESTIONS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time, there was a small",
    "The three primary colours are",
    "To bake bread you need flour,",
    "The theory of relativity was published by",
    "In the morning, the birds",
    "A list of planets: Mercury, Venus,",
    "SELECT name FROM users WHERE",
    "The quick brown fox",
    "My favourite book is about",
    "Photosynthesis is the process by which",
    "The meeting is scheduled for Monday at",
    "import numpy as np\n",
    "Dear Sir or Madam,\n",
    "The largest ocean on Earth is",
    "If it rains tomorrow, we will",
    "Two plus two equals",
    "A good night's sleep helps you",
]


@dataclass
class Answer:
    """One answer of a server: token ids of prompt and continuation, and the continuation's logprobs."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def ask(
    server: EngineServer, model: Path, questions: list[str] = QUESTIONS, tokens: int = TOKENS, at_once: int = 1
) -> list[Answer]:
    """Ask a running server with the OpenAI client."""
    from openai import OpenAI
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)

    def answer(question: str) -> Answer:
        prompt = tokenizer(question, add_special_tokens=False).input_ids
        choice: Any = client.completions.create(
            model=server.model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            logprobs=1,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        ).choices[0]
        assert len(choice.token_ids) == tokens
        return Answer(prompt, choice.token_ids, choice.logprobs.token_logprobs)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(answer, questions))


def reference_model(checkpoint: Path, original: Path) -> Any:
    """The original architecture in PyTorch with the checkpoint's dequantised weights, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    made = Checkpoint(checkpoint)
    layout = read_source(made.config["quantization_config"]).layout
    marker = ".weight_packed" if layout is Layout.COMPRESSED_TENSORS else ".weight_scale_2"
    names = [name.removesuffix(marker) for name in made.entries if name.endswith(marker)]
    assert names
    for name in names:
        model.get_submodule(name).weight.data = vocabulary.read_layer(made, name, layout)[0].dequantize()
    return model


def compare(answers: list[Answer], model: Any) -> dict[str, float]:
    """What lies between answers and a reference: differences of the chosen tokens' logprobs, and other first tokens."""
    differences: list[float] = []
    gaps: list[float] = []
    for answer in answers:
        ids = torch.tensor([answer.prompt + answer.tokens])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(answer.prompt) - 1 : -1].log_softmax(-1)
        chosen = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        differences += (chosen - torch.tensor(answer.logprobs)).abs().tolist()
        gaps += (logits.amax(-1) - chosen).tolist()
    found = {
        "mean": sum(differences) / len(differences),
        "worst": max(differences),
        "other tokens": sum(gap > 0 for gap in gaps) / len(gaps),
        "widest gap": max(gaps),
    }
    print(found)
    return found


def check(answers: list[Answer], model: Any) -> None:
    """Hold answers against the reference."""
    found = compare(answers, model)
    assert found["mean"] < MEAN and found["worst"] < WORST and found["widest gap"] < NEAR_TIE, found


def saturate(made: Path) -> None:
    """Divide the input scales of a ModelOpt checkpoint by 30, so that W4A4 clips most activations.

    Rounding activations to four bits is not continuous: one code that falls the other side of a tie moves the rest of
    the model, and two exact implementations drift apart. Clipping is continuous and far from W4A16, so it shows
    whether activations are quantised by the checkpoint's scales.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(made / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".input_scale")]:
        tensors[name] = tensors[name] / 30
    save_file(tensors, made / "model.safetensors", {"format": "pt"})


def check_w4a4(answers: list[Answer], made: Path, original: Path) -> None:
    """Hold answers of a saturated W4A4 checkpoint against its reference, and against that of the weights alone."""
    weights = compare(answers, reference_model(made, original))
    both = compare(answers, activations_too(reference_model(made, original), made))
    assert both["mean"] < 0.1 and both["mean"] < 0.1 * weights["mean"], (both, weights)


def save(answers: list[Answer], engine: str) -> None:
    """Keep an engine's answers for the comparison between the engines."""
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    (OUTPUTS / f"{engine}.json").write_text(json.dumps([asdict(answer) for answer in answers]))


def saved(engine: str) -> list[Answer]:
    """The answers that an engine's tests kept."""
    path = OUTPUTS / f"{engine}.json"
    assert path.is_file(), f"{path} is missing: `make test` runs the tests of {engine} first"
    return [Answer(**answer) for answer in json.loads(path.read_text())]


def check_between(first: list[Answer], second: list[Answer], model: Any) -> None:
    """Two engines' answers are the same up to a near-tie, where the rest may well differ."""
    agreed_tokens = 0
    for one, other in zip(first, second, strict=True):
        assert one.prompt == other.prompt
        pairs = list(zip(one.tokens, other.tokens, strict=True))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        agreed_tokens += at
        agreed = torch.tensor(one.logprobs[:at]) - torch.tensor(other.logprobs[:at])
        assert not at or float(agreed.abs().max()) < WORST
        if at < len(pairs):
            with torch.inference_mode():
                logits = model(torch.tensor([one.prompt + one.tokens[:at]])).logits[0, -1].log_softmax(-1)
            gap = float((logits[one.tokens[at]] - logits[other.tokens[at]]).abs())
            assert gap < NEAR_TIE, f"token {at} of {one.prompt}: the candidates are {gap:.3f} nats apart"
    assert agreed_tokens > 16 * len(first), f"{agreed_tokens} tokens agree over {len(first)} answers"


@contextmanager
def running(servers: Mapping[str, EngineServer]) -> Iterator[Mapping[str, EngineServer]]:
    """Start the servers at once and end them all."""
    try:
        for server in servers.values():
            server.start()
        for server in servers.values():
            server.wait()
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def fourfold_lines(server: EngineServer) -> list[str]:
    """What fourfold logged about layers."""
    text = server.log.read_text(errors="replace")
    return [line[line.index("fourfold: ") :] for line in text.splitlines() if "fourfold: " in line]


def probe(server: EngineServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``fourfold doctor --probe`` of the server, as a user runs it."""
    command = [Path(sys.executable).parent / "fourfold", "doctor", "--probe", server.url, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def own_scales(source: Path, out: Path) -> Path:
    """Write an NVFP4 checkpoint whose fused shards have very different global scales, as ModelOpt tensors.

    fourfold's own writer gives them one; other tools do not.
    """
    from safetensors.torch import save_file

    from fourfold.common.quant.backends import Scheme
    from fourfold.common.quant.checkpoint.layers import choose
    from fourfold.common.quant.quantizer import quantize_weight

    checkpoint = Checkpoint(source)
    tensors: dict[str, torch.Tensor] = {}
    layers = choose(checkpoint, read_source(None), ()).quantised
    for name in checkpoint.entries:
        module = name.removesuffix(".weight")
        if module not in layers:
            tensors[name] = checkpoint.tensor(name)
            continue
        larger = 4.0 if module.endswith(("v_proj", "up_proj")) else 1.0
        weight = quantize_weight(checkpoint.tensor(name).float() * larger, name=name)
        tensors |= vocabulary.tensors_of(module, weight, None, Layout.MODELOPT)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = checkpoint.config | {
        "quantization_config": vocabulary.quantization_config("modelopt", Scheme.W4A16, ["lm_head"])
    }
    (out / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    return out


def collapse(model: Any, checkpoint: Path) -> Any:
    """Give every fused layer of a reference the largest global scale of its shards, as the stock engines do."""
    from fourfold.common.quant.checkpoint.layers import fused_with

    made = Checkpoint(checkpoint)
    for name in [n.removesuffix(".weight_scale_2") for n in made.entries if n.endswith(".weight_scale_2")]:
        scales = {other: float(made.tensor(f"{other}.weight_scale_2")) for other in fused_with(name)}
        model.get_submodule(name).weight.data *= max(scales.values()) / scales[name]
    return model


def quantised_while_loading(source: Path, weighting: dict[str, torch.Tensor] | None = None) -> Any:
    """The reference of a model that an engine quantises while it loads: each shard under its own global scale."""
    from transformers import AutoModelForCausalLM

    from fourfold.common.quant.quantizer import quantize_weight

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            importance = (weighting or {}).get(name)
            weight = module.weight.data.to(torch.bfloat16)
            module.weight.data = quantize_weight(weight, name=name, importance=importance).dequantize()
    return model


def activations_too(model: Any, checkpoint: Path) -> Any:
    """Let a reference quantise the inputs of its layers with the checkpoint's static scales (W4A4)."""
    from fourfold.common.quant.activations import fake_quantize

    made = Checkpoint(checkpoint)
    layout = read_source(made.config["quantization_config"]).layout
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = vocabulary.read_layer(made, name, layout)[1]
            assert scale is not None

            def hook(_: Any, inputs: tuple[torch.Tensor, ...], scale: torch.Tensor = scale) -> tuple[torch.Tensor]:
                x = inputs[0].to(torch.bfloat16)  # as the engine hands it over
                return (fake_quantize(x.reshape(-1, x.shape[-1]), scale).view_as(x),)

            module.register_forward_pre_hook(hook)
    return model

"""MTP in vLLM: what the generic head drafts, to the token, and that the output is the target's whatever it drafts.

Acceptance is asserted exactly, on a model whose text and drafts are known (`oracle`). Engines run one after the other
in one process (`engine_runs`), except what needs a server or two ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engine_runs
import oracle_modules
import pytest
import torch
from mtp_models import write_random
from oracle import BAD, NORM, ORDER, SIZE, chi_square, continuation, expected_drafts, probability, prompt, write_oracle
from safetensors.torch import load_file, save_file

from fourfold.common.mtp.extract import extract
from fourfold.common.quant.checkpoint.convert import Options, convert

K = 3
VOCABULARY = "model.layers.2.shared_head.vocabulary.weight"
TEXTS = [prompt(ORDER[20 * i]) for i in range(4)]
ONE_TOKEN = [[ORDER[0]], TEXTS[1]]
TOKENS = 30
EVERY = frozenset(range(SIZE))
ADAPTIVE = "fourfold.vllm_ext.mtp_scheduler.AdaptiveScheduler"
EACH = {"worker_cls": "fourfold.vllm_ext.modules_worker.ModulesWorker", "num_speculative_tokens": 2}


@dataclass
class Head:
    """An oracle to serve, and what its head gets right.

    Attributes:
        kinds, family: as `write_oracle` takes them.
        feedback: overrides the family's in the draft directory.
        wrong, depth: as `expected_drafts` takes them.
        quantization: of the draft, as the user asks for it.
        stored: quantise the checkpoint first, in this format.
        undrafted: words that are not in the head's draft vocabulary.
        texts: prompts.
        options: of the engine.
    """

    kinds: tuple[str, ...]
    family: str = "deepseek_v3"
    feedback: str | None = None
    wrong: frozenset[int] = frozenset()
    depth: int | None = None
    quantization: str | None = None
    stored: str | None = None
    undrafted: frozenset[int] = frozenset()
    texts: list[list[int]] = field(default_factory=lambda: TEXTS)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def k(self) -> int:
        return self.options.get("num_speculative_tokens", K)

    def expected(self, masked: bool) -> tuple[int, list[int]]:
        """What the engine should count for `texts`; ``masked``: nothing is known of the first position's embedding."""
        total, accepted = 0, [0] * self.k
        for text in self.texts:
            tokens = TOKENS
            if masked and len(text) == 1:  # the first draft knows nothing
                text, tokens, total = prompt(text[0], 2), tokens - 1, total + 1
            if "worker_cls" in self.options:
                steps, good = oracle_modules.expected_drafts(text, tokens, self.k, self.kinds)
            else:
                steps, good = expected_drafts(text, tokens, self.k, self.wrong, self.depth)
            total, accepted = total + steps, [a + b for a, b in zip(accepted, good, strict=True)]
        return total, accepted


NVFP4 = "fourfold_nvfp4"
UNDRAFTED = frozenset(ORDER[::7])
BEFORE_UNDRAFTED = frozenset(token for token in ORDER if continuation(token, 3)[-1] in UNDRAFTED)
HEADS = {
    "right": Head(("right",)),
    "hidden state and embedding exchanged": Head(("swapped",), wrong=EVERY),
    "wrong after one token in five": Head(("bad",), wrong=BAD),
    "embedding alone": Head(("embedding",), texts=ONE_TOKEN),
    "feedback after the norm": Head(("post_norm",)),
    "feedback after the norm, described as before": Head(("post_norm",), feedback="pre_norm", depth=1),
    "feedback before the norm": Head(("pre_norm",), feedback="pre_norm"),
    "feedback before the norm, described as after": Head(("pre_norm",), depth=1),
    "Qwen3-Next": Head(("right",), "qwen3_next"),
    "Qwen3-Next, embedding alone": Head(("embedding",), "qwen3_next", texts=ONE_TOKEN),
    "MiMo": Head(("right",), "mimo"),
    # The V1 model runner, the only one on a CPU, drafts with the first module unless a worker lets it use all.
    "two modules": Head(("right", "swapped"), options={"num_speculative_tokens": 4}),
    "two modules, of which one drafts": Head(("first", "second"), depth=1, options={"num_speculative_tokens": 2}),
    "two modules, each its token": Head(("first", "second"), options=EACH),
    "two modules exchanged": Head(("second", "first"), options=EACH),
    "two modules, the first wrong after one token in five": Head(("first bad", "second"), options=EACH),
    "quantised while loading": Head(("right",), quantization=NVFP4),
    "NVFP4 checkpoint of ModelOpt layout": Head(("right",), quantization=NVFP4, stored="modelopt"),
    "NVFP4 checkpoint that names fourfold": Head(("right",), stored="fourfold"),
    "draft vocabulary": Head(("right",), undrafted=UNDRAFTED, wrong=BEFORE_UNDRAFTED),
    "draft vocabulary, without logits": Head(
        ("right",),
        undrafted=UNDRAFTED,
        wrong=BEFORE_UNDRAFTED,
        options={"use_local_argmax_reduction": True},
    ),
    "no draft vocabulary, without logits": Head(("right",), options={"use_local_argmax_reduction": True}),
    "quantised target": Head(("right",), options={"quantization": NVFP4}),
}


def serve(head: Head, where: Path, requests: list[dict[str, Any]], scale: float = 1.0) -> dict[str, Any]:
    """The case of a head."""
    target, model = write_oracle(where, head.family, head.kinds, scale)
    if head.undrafted:
        words = torch.tensor([word for word in range(SIZE) if word not in head.undrafted], dtype=torch.int32)
        tensors = load_file(model / "model.safetensors") | {VOCABULARY: words}
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    if head.stored:
        convert(model, where / "stored", Options(format=head.stored))
        model = where / "stored"
    extract(model, where / "draft", "vllm")
    if head.feedback:
        config = json.loads((where / "draft" / "config.json").read_text())
        config["fourfold_mtp"]["formula"]["feedback"] = head.feedback
        (where / "draft" / "config.json").write_text(json.dumps(config))
    options = dict(head.options)
    speculative = {"method": "mtp", "model": str(where / "draft"), "num_speculative_tokens": K}
    own = ("num_speculative_tokens", "num_speculative_tokens_per_batch_size", "use_local_argmax_reduction")
    own += ("draft_sample_method",)
    speculative |= {key: options.pop(key) for key in own if key in options}
    speculative |= {"quantization": head.quantization} if head.quantization else {}
    return {"model": str(target), "options": {**options, "speculative_config": speculative}, "requests": requests}


def greedy(texts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    return [{"prompt": list(text), "temperature": 0, "max_tokens": tokens} for text in texts]


LONG = [prompt(ORDER[40 * i], 90) for i in range(6)]
SCALE = 0.4  # of the output head: the following token has probability 0.70
SAMPLED = [{"prompt": prompt(ORDER[7 * i]), "temperature": 1, "max_tokens": 120} for i in range(32)]


def altered(case: dict[str, Any], name: str, **changes: Any) -> dict[str, Any]:
    """The case with other values in the description of its head; None drops it."""
    draft = Path(case["options"]["speculative_config"]["model"])
    shutil.copytree(draft, draft.parent / name, symlinks=True)
    config = json.loads((draft / "config.json").read_text())
    config["fourfold_mtp"] = config["fourfold_mtp"] | changes if changes else None
    (draft.parent / name / "config.json").write_text(json.dumps(config))
    speculative = case["options"]["speculative_config"] | {"model": str(draft.parent / name)}
    return {**case, "options": case["options"] | {"speculative_config": speculative}}


def own_and_generic(where: Path, model_type: str) -> dict[str, Any]:
    """A random model with vLLM's own class for its head, and with the generic one."""
    model = write_random(where / "model", model_type)
    extract(model, where / "draft", "vllm")
    if model_type == "glm4_moe":  # vLLM's own class feeds the state before the norm back
        config = json.loads((where / "draft" / "config.json").read_text())
        config["fourfold_mtp"]["formula"]["feedback"] = "pre_norm"
        (where / "draft" / "config.json").write_text(json.dumps(config))
    texts = [[(7 * i + 31 * j) % SIZE for j in range(3 + 4 * i)] for i in range(4)]
    cases = {}
    for name, draft in (("own", {}), ("generic", {"model": str(where / "draft")})):
        speculative = {"method": "mtp", "num_speculative_tokens": 2, **draft}
        options = {"speculative_config": speculative, "skip_tokenizer_init": True}
        cases[f"{name} {model_type}"] = {"model": str(model), "options": options, "requests": greedy(texts, 20)}
    return cases


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all cases, and the log under ``log``."""
    folder = tmp_path_factory.mktemp("mtp")
    cases = {name: serve(head, folder / name, greedy(head.texts, TOKENS)) for name, head in HEADS.items()}
    crowded = {"block_size": 32, "num_gpu_blocks_override": 20, "max_num_batched_tokens": 64, "max_num_seqs": 6}
    cases["crowded"] = serve(Head(("right",), options=crowded), folder / "crowded", greedy(LONG, 60))
    # Sampled beside greedy ones, and as certain.
    cases["crowded"]["requests"][1] |= {"temperature": 1, "top_k": 1}
    cases["crowded"]["requests"][4] |= {"temperature": 1, "top_p": 1e-6}
    cases["sampled"] = serve(Head(("embedding",), options={"max_num_seqs": 64}), folder / "sampled", SAMPLED, SCALE)
    sampling = {**EACH, "draft_sample_method": "probabilistic", "max_num_seqs": 64}
    sampled = Head(("embedding", "embedding"), options=sampling)
    cases["sampled from two modules"] = serve(sampled, folder / "sampled from two", SAMPLED, SCALE)
    for kind in ("swapped", "right"):
        options = {"scheduler_cls": ADAPTIVE, "num_speculative_tokens_per_batch_size": [[1, 8, K]]}
        case = serve(Head((kind,), options=options), folder / f"adaptive {kind}", greedy(TEXTS[:1], 150))
        cases[f"adaptive {kind}"] = {**case, "step_seconds": [0.3, 0.4, 0.5, 0.6]}
    cases["another model's"] = altered(cases["right"], "other", target_layers=5)
    cases["not described"] = altered(cases["right"], "none")
    cases["no table"] = {**cases["right"], "options": cases["right"]["options"] | {"scheduler_cls": ADAPTIVE}}
    more = {**EACH, "num_speculative_tokens": 4}
    few = serve(Head(("first", "second"), options=more), folder / "few", [])
    cases["more tokens than modules"] = {**few, "config": {}}
    cases["a worker for several, without a head"] = {
        "model": few["model"],
        "options": {"worker_cls": EACH["worker_cls"]},
        "config": {},
    }
    for model_type in ("glm4_moe", "deepseek_v3"):
        cases |= own_and_generic(folder / model_type, model_type)
    # These models are too small for two cores.
    return engine_runs.run_all(folder, cases, str(min(os.sched_getaffinity(0))))


@pytest.mark.parametrize("name", HEADS)
def test_the_output_is_the_targets_and_acceptance_that_of_the_head(runs: dict[str, Any], name: str) -> None:
    head, result = HEADS[name], runs[name]
    assert result["tokens"] == [continuation(text[-1], TOKENS) for text in head.texts]
    assert (result["steps"], result["accepted"]) == head.expected(masked=head.family != "qwen3_next")
    assert result["drafted"] == head.k * result["steps"] and result["class"] == "FourfoldMTP"


def test_modules_are_accepted_in_their_places(runs: dict[str, Any]) -> None:
    right = runs["two modules, each its token"]
    assert right["accepted"] == [right["steps"]] * 2
    assert runs["two modules exchanged"]["accepted"] == [0, 0]
    partly = runs["two modules, the first wrong after one token in five"]
    assert partly["steps"] > partly["accepted"][0] > partly["accepted"][1] > 0


def test_the_log_says_how_heads_are_served(runs: dict[str, Any]) -> None:
    logs = {part.partition("\n")[0]: part for part in runs["log"].split("CASE ")}
    assert "fourfold: MTP head mimo around LlamaDecoderLayer, 1 of 1 modules draft" in logs["MiMo"]
    for name, drafting in (("two modules", 1), ("two modules, each its token", 2)):
        line = f"fourfold: MTP head deepseek_v3 around LlamaDecoderLayer, {drafting} of 2 modules draft"
        assert line in logs[name]
    assert "around DeepseekV2DecoderLayer" in logs["generic deepseek_v3"]
    kinds = "5 layers (eh_proj, down_proj, gate_up_proj, o_proj, qkv_proj)"
    for name, origin in (
        ("quantised while loading", "quantised while loading"),
        ("NVFP4 checkpoint of ModelOpt layout", "weights of the checkpoint (modelopt)"),
        ("NVFP4 checkpoint that names fourfold", "weights of the checkpoint (compressed-tensors)"),
    ):
        served = [line for line in logs[name].splitlines() if "fourfold: nvfp4" in line]
        assert len(served) == 1 and kinds in served[0] and origin in served[0]
    served = [line for line in logs["quantised target"].splitlines() if "fourfold: nvfp4" in line]
    assert len(served) == 1 and "eh_proj" not in served[0] and "8 layers" in served[0]
    assert "fourfold: nvfp4" not in logs["right"]


def test_prefill_in_chunks_and_preempted_requests(runs: dict[str, Any]) -> None:
    result = runs["crowded"]
    assert result["tokens"] == [continuation(text[-1], 60) for text in LONG]
    assert result["preemptions"] > 0 and result["accepted"] == [result["steps"]] * K


def test_sampled_output_follows_the_target(runs: dict[str, Any]) -> None:
    result = runs["sampled"]
    assert chi_square([request["prompt"] for request in SAMPLED], result["tokens"], SCALE) < 88.0
    # A draft of one token for certain is accepted with that token's probability.
    reached, accepted, p = result["steps"] + sum(result["accepted"][:-1]), sum(result["accepted"]), probability(SCALE)
    assert abs(accepted / reached - p) < 3 * (p * (1 - p) / reached) ** 0.5


def test_drafts_of_two_modules_are_sampled_with_their_probabilities(runs: dict[str, Any]) -> None:
    result = runs["sampled from two modules"]
    assert chi_square([request["prompt"] for request in SAMPLED], result["tokens"], SCALE) < 88.0
    # The norm of a module turns its logits up by the token, so that it is surer than the target.
    tops = (SCALE * NORM * (1 + torch.arange(SIZE) / SIZE)).exp()
    surer, p = tops / (tops + SIZE - 1), probability(SCALE)
    reached, accepted = result["steps"] + result["accepted"][0], sum(result["accepted"])
    print(accepted / reached)
    assert abs(accepted / reached - (p + 1 - surer.mean().item())) < 0.03


@pytest.mark.parametrize(("kind", "best"), [("swapped", 0), ("right", K)])
def test_the_draft_length_is_learned(runs: dict[str, Any], kind: str, best: int) -> None:
    result = runs[f"adaptive {kind}"]
    assert result["tokens"] == [continuation(TEXTS[0][-1], 150)]
    lengths = [len(step[0]) for step in result["proposed"]]
    print("".join(map(str, lengths)))
    assert set(lengths) == set(range(K + 1))  # each is tried
    assert lengths[30:].count(best) > 0.8 * len(lengths[30:])
    assert sum(result["accepted"]) == (result["drafted"] if best else 0)


@pytest.mark.parametrize("model_type", ["glm4_moe", "deepseek_v3"])
def test_drafts_as_vllms_own_class_does(runs: dict[str, Any], model_type: str) -> None:
    own, generic = runs[f"own {model_type}"], runs[f"generic {model_type}"]
    assert own["class"] != "FourfoldMTP" == generic["class"]
    assert own["tokens"] == generic["tokens"] and own["proposed"] == generic["proposed"]
    assert len({tuple(draft) for step in own["proposed"] for draft in step}) > 60


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("another model's", "is the head of a model of 5 layers and hidden size 256; "),
        ("not described", "fourfold_mtp: expected an object, got None; write the draft directory again"),
        ("more tokens than modules", "ModulesWorker: num_speculative_tokens 4: expected at most the 2 modules"),
        ("a worker for several, without a head", "ModulesWorker needs a draft directory: `fourfold mtp extract`"),
        ("no table", "--speculative-config needs num_speculative_tokens_per_batch_size, for instance [[1, 8, 3]]"),
    ],
)
def test_what_cannot_be_served_is_refused(runs: dict[str, Any], name: str, words: str) -> None:
    assert words in runs[name]["error"]

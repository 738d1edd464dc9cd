"""MTP heads in SGLang on a CPU: acceptance is exact on the oracle, the text is always the target's.

Five servers start at once: an oracle whose head is exchanged while it serves, an oracle with an NVFP4 head, two layers
of a real model, whose attention has to be right over several verified tokens, an oracle on two ranks, and one with
DeepSeek-V3's MLA attention and experts. The first, the third and the fourth draft with ``FOURFOLD_MTP`` from text and
head, the second with the head alone, the last is ``EAGLE``. The third and the fourth learn how much the head drafts.
"""

from __future__ import annotations

import json
import math
import re
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import engine_checks
import oracle
import pytest
import torch
from forked_server import ForkedServer
from oracle_mla import DEEPSEEK
from safetensors.torch import load_file, save_file
from sglang_answers import SIZES, TOKENS, accepted, exchange, generate

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.extract import extract
from fourfold.common.mtp.hybrid import SOURCES, HybridDrafts, SourceTotals
from fourfold.common.quant.checkpoint.convert import Options, convert
from fourfold.common.serving import EngineServer, free_port
from fourfold.common.settings import HybridSettings

K, WIDTH, SCALE = 3, 6, 0.4  # K tokens drafted by the head, WIDTH verified
LONG = 200  # tokens of an answer in which something is learned; the oracle's text repeats itself after 256
HEADS = {"right": frozenset(), "swapped": frozenset(range(oracle.SIZE)), "bad": oracle.BAD, "embedding": frozenset()}
FLAGS = ["--speculative-algorithm", "FOURFOLD_MTP", "--speculative-num-steps"]
EAGLE = ["--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens"]
EAGLE += [str(K + 1), "--speculative-num-steps"]
FIXED = {"mtp": {"hybrid": {"learn_head": False}}}
HEAD_ALONE = {"mtp": {"hybrid": {"enabled": False, "learn_head": False}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The oracle with each kind of head, in a family whose projection takes the hidden state first."""
    path = tmp_path_factory.mktemp("oracle")
    return {kind: oracle.write_oracle(path / kind, "mimo", (kind,), SCALE)[1] for kind in HEADS}


@pytest.fixture(scope="module")
def mla_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """DeepSeek-V3's oracle, whose text its own attention decides, with three kinds of head."""
    path = tmp_path_factory.mktemp("mla")
    kinds = ("right", "swapped", "bad")
    return {kind: oracle.write_oracle(path / kind, heads=(kind,), architecture=DEEPSEEK)[1] for kind in kinds}


def write_echo(model: Path, out: Path) -> Path:
    """The model with a head that drafts the last token again, which a model of two layers often means."""
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    size, layers = config["hidden_size"], config["num_hidden_layers"]
    head = f"model.layers.{layers}."
    own = {n: t for n, t in tensors.items() if n.startswith(f"model.layers.{layers - 1}.")}
    for name, tensor in own.items():
        silent = name.endswith(("o_proj.weight", "down_proj.weight"))
        tensors[head + name.split(".", 3)[3]] = torch.zeros_like(tensor) if silent else tensor.clone()
    norm = torch.ones(size, dtype=tensors["model.norm.weight"].dtype)
    tensors |= {f"{head}{role}.weight": norm.clone() for role in ("enorm", "hnorm", "shared_head.norm")}
    tensors[f"{head}eh_proj.weight"] = torch.eye(size, 2 * size, dtype=norm.dtype)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((model / name).read_bytes())
    return out


@pytest.fixture(scope="module")
def servers(
    models: dict[str, Path], mla_models: dict[str, Path], cut: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, EngineServer]]:
    path = tmp_path_factory.mktemp("servers")
    target, whole = oracle.write_oracle(path / "oracle")
    convert(whole, path / "nvfp4", Options(format="modelopt"))
    echo = write_echo(cut, path / "echo")
    quantised = ["--speculative-draft-model-quantization", "fourfold_nvfp4"]
    plans = {
        "oracle": (models["right"].parent / "target", models["right"], [*FLAGS, str(WIDTH), "--enable-metrics"]),
        "nvfp4": (target, path / "nvfp4", [*FLAGS, str(K), *quantised]),
        "echo": (echo, echo, [*FLAGS, str(WIDTH), "--dtype", "float32", "--constrained-json-disable-any-whitespace"]),
        "ranks": (
            models["right"].parent / "target",
            models["right"],
            [*FLAGS, str(WIDTH), "--tp-size", "2", "--enable-metrics"],
        ),
        # As a checkpoint of DeepSeek-V3 is: target and head in one directory.
        "mla": (mla_models["right"], mla_models["right"], [*EAGLE, str(K), "--dtype", "float32"]),
    }
    environments = {name: {"FOURFOLD_CONFIG": json.dumps(c)} for name, c in (("oracle", FIXED), ("nvfp4", HEAD_ALONE))}
    environments["ranks"] = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    running = {}
    for name, (model, with_head, more) in plans.items():
        draft = path / f"{name}-draft"
        extract(with_head, draft, "sglang")
        arguments = [*more, "--speculative-draft-model-path", str(draft), *SIZES]
        env = {"OMP_NUM_THREADS": "1"} | environments.get(name, {})
        # Not of the range from which the servers beside it take ports for themselves.
        port = free_port(21700 + len(running))
        running[name] = ForkedServer("sglang", str(model), path / f"{name}.log", arguments, env, port)
    with engine_checks.running(running):
        yield running


def check_oracle(server: EngineServer, wrong: frozenset[int]) -> None:
    """One request alone, then several of different lengths at once."""
    prompts = [oracle.prompt(start, length) for start, length in ((3, 4), (17, 9), (40, 5), (99, 13))]
    for prompt, answer in zip(prompts, generate(server, prompts[:1]) + generate(server, prompts[1:]), strict=True):
        assert answer["output_ids"] == oracle.continuation(prompt[-1], TOKENS)
        assert accepted(answer, K) == oracle.expected_drafts(prompt, TOKENS, K, wrong)


@pytest.mark.parametrize("kind", HEADS)
def test_each_head_is_accepted_exactly_where_it_is_right(
    servers: dict[str, EngineServer], models: dict[str, Path], kind: str
) -> None:
    exchange(servers["oracle"], models[kind])
    check_oracle(servers["oracle"], HEADS[kind])


@pytest.mark.parametrize("kind", ["right", "swapped", "bad"])
def test_mla_attention_in_target_and_head(
    servers: dict[str, EngineServer], mla_models: dict[str, Path], kind: str
) -> None:
    exchange(servers["mla"], mla_models[kind])
    check_oracle(servers["mla"], HEADS[kind])


def counted(server: EngineServer) -> dict[str, SourceTotals]:
    """The counts by source of ``/metrics``."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = {source: SourceTotals(accepted_by_position=[0] * WIDTH) for source in SOURCES}
    for line in lines:
        if match := re.fullmatch(r'fourfold:spec_(\w+)_total\{(?:position="(\d+)",)?source="(\w+)"\} (\S+)', line):
            name, position, source, value = match[1], match[2], match[3], int(float(match[4]))
            if name == "accepted_tokens":
                found[source].accepted_by_position[int(position)] = value
                found[source].accepted += value
            else:
                setattr(found[source], {"drafts": "drafts", "draft_tokens": "drafted"}[name], value)
    return found


def difference(after: SourceTotals, before: SourceTotals) -> tuple[int, int, list[int]]:
    pairs = zip(after.accepted_by_position, before.accepted_by_position, strict=True)
    return after.drafts - before.drafts, after.drafted - before.drafted, [a - b for a, b in pairs]


def repetitive(start: int, length: int = 40, again: int = 6) -> list[int]:
    """A prompt of the model's own text that begins anew at its end."""
    text = oracle.prompt(start, length)
    return text + text[:again]


def expected_hybrid(drafts: HybridDrafts, prompt: list[int], wrong: frozenset[int]) -> tuple[int, list[int]]:
    """What SGLang has to count for one answer, with both sources of drafts; ``drafts`` counts them."""
    text, end = [*prompt, *oracle.continuation(prompt[-1], 1)], len(prompt) + TOKENS
    steps, by_position = 0, [0] * WIDTH
    while len(text) < end:
        right = oracle.continuation(text[-1], WIDTH + 1)
        drafts.observe("request", text)
        draft = drafts.propose("request", WIDTH)
        good = 0
        if draft:
            while good < len(draft) and draft[good] == right[good]:
                good += 1
        else:
            while good < K and (text + right)[len(text) + good - 3] not in wrong:
                good += 1
        drafts.verified("request", len(draft) or K, good)
        steps, text = steps + 1, text + right[: good + 1]
        for position in range(good):
            by_position[position] += 1
    drafts.retain([])
    return steps, by_position


@pytest.mark.parametrize("kind", ["right", "swapped", "bad"])
def test_text_and_head_draft_together(servers: dict[str, EngineServer], models: dict[str, Path], kind: str) -> None:
    """A request that repeats its text, then it among others that do and do not."""
    server = servers["oracle"]
    exchange(server, models[kind])
    before = counted(server)
    prompts = [repetitive(3), repetitive(17), oracle.prompt(40, 5), repetitive(99, 20, 4), oracle.prompt(5, 60)]
    drafts = HybridDrafts(HybridSettings())
    for prompt, answer in zip(prompts, generate(server, prompts[:1]) + generate(server, prompts[1:]), strict=True):
        assert answer["output_ids"] == oracle.continuation(prompt[-1], TOKENS)
        assert accepted(answer, WIDTH) == expected_hybrid(drafts, prompt, HEADS[kind])
    after, expected = counted(server), drafts.totals()
    for source in SOURCES:
        totals = expected[source]
        places = totals.accepted_by_position + [0] * (WIDTH - len(totals.accepted_by_position))
        assert difference(after[source], before[source]) == (totals.drafts, totals.drafted, places)
    # What the text gives does not depend on the head here.
    assert (expected["suffix"].drafts, expected["suffix"].drafted, expected["suffix"].accepted) == (13, 77, 71)
    assert (expected["mtp"].accepted == 0) == (kind == "swapped")


@pytest.mark.parametrize("kind", ["right", "swapped"])
def test_two_ranks_learn_the_length_of_the_head(
    servers: dict[str, EngineServer], models: dict[str, Path], kind: str
) -> None:
    """Each has its own clock; ranks that chose different lengths would wait for each other for ever."""
    server = servers["ranks"]
    exchange(server, models[kind])
    generate(server, [oracle.prompt(60), oracle.prompt(150)], LONG)  # it forgets the head before
    generate(server, [oracle.prompt(90)], LONG)
    before = counted(server)
    prompts = [oracle.prompt(3), oracle.prompt(17, 9), repetitive(99, 20, 4), oracle.prompt(40, 5), oracle.prompt(200)]
    answers = generate(server, prompts[:1], LONG) + generate(server, prompts[1:], LONG)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["output_ids"] == oracle.continuation(prompt[-1], LONG)
    after = counted(server)
    _, drafted, by_position = difference(after["mtp"], before["mtp"])
    steps = sum(answer["meta_info"]["spec_verify_ct"] for answer in answers)
    print(f"{drafted} tokens drafted by the head in {steps} steps, {by_position} accepted")
    if kind == "right":
        assert sum(by_position) > 0.95 * drafted and drafted > 0.9 * steps
    else:
        assert sum(by_position) == 0 and drafted < 1.5 * steps


@pytest.mark.parametrize(("kind", "status"), [("right", 0), ("swapped", 1)])
def test_a_probe_tells_a_wrong_head(
    servers: dict[str, EngineServer], models: dict[str, Path], kind: str, status: int
) -> None:
    exchange(servers["oracle"], models[kind])
    before = counted(servers["oracle"])
    done = engine_checks.probe(servers["oracle"], "--prompts", "8")
    after = counted(servers["oracle"])
    print(done.stdout)
    assert done.returncode == status, done.stdout + done.stderr
    drafts, drafted, by_position = difference(after["mtp"], before["mtp"])
    assert f"source mtp: {drafts} drafts, {drafted} tokens, {sum(by_position)} accepted" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith(
        "FAIL acceptance collapsed: mean acceptance length 1.0" if status else "ok   mean acceptance"
    )


def test_nvfp4_head(servers: dict[str, EngineServer]) -> None:
    check_oracle(servers["nvfp4"], frozenset())
    line = next(line for line in engine_checks.fourfold_lines(servers["nvfp4"]) if "nvfp4 w4" in line)
    assert "for 5 layers (eh_proj, down_proj, gate_up_proj, o_proj, qkv_proj)" in line


def sampled_probability(top_k: int, top_p: float) -> float:
    """Of the following token, at temperature 1."""
    first = oracle.probability(SCALE)
    rest = (1 - first) / (oracle.SIZE - 1)
    others = min(top_k - 1, oracle.SIZE - 1, int((top_p - first) / rest) + 1)
    return first / (first + others * rest)


@pytest.mark.parametrize(("top_k", "top_p"), [(oracle.SIZE, 1.0), (5, 1.0), (oracle.SIZE, 0.8)])
def test_sampling_keeps_the_distribution(
    servers: dict[str, EngineServer], models: dict[str, Path], top_k: int, top_p: float
) -> None:
    exchange(servers["oracle"], models["embedding"])
    prompts = [oracle.prompt(start) for start in range(80)]
    answers = generate(servers["oracle"], prompts, temperature=1, top_k=top_k, top_p=top_p)
    followed = total = first = steps = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        text = [prompt[-1], *answer["output_ids"]]
        followed += sum(oracle.PERMUTATION[a] == b for a, b in zip(text, text[1:], strict=False))
        total += len(text) - 1
        first, steps = first + accepted(answer, K)[1][0], steps + accepted(answer, K)[0]
    p = sampled_probability(top_k, top_p)
    print(followed / total, first / steps, p)
    for hits, count in ((followed, total), (first, steps)):
        assert abs(hits / count - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_sampling_keeps_the_distribution_with_drafts_from_the_text(
    servers: dict[str, EngineServer], models: dict[str, Path]
) -> None:
    """Each prompt has the whole cycle, so that every draft from it is what most likely follows."""
    exchange(servers["oracle"], models["swapped"])
    before = counted(servers["oracle"])["suffix"]
    prompts = [oracle.prompt(start, oracle.SIZE + 4) for start in range(40)]
    answers = generate(servers["oracle"], prompts, temperature=1)
    pairs = [pair for p, a in zip(prompts, answers, strict=True) for pair in pairwise([p[-1], *a["output_ids"]])]
    followed = sum(oracle.PERMUTATION[first] == second for first, second in pairs)
    drafts, _, by_position = difference(counted(servers["oracle"])["suffix"], before)
    p = oracle.probability(SCALE)
    print(followed / len(pairs), by_position, drafts, p)
    for hits, count in ((followed, len(pairs)), (by_position[0], drafts)):
        assert count > 60 and abs(hits / count - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_logprobs(servers: dict[str, EngineServer], models: dict[str, Path]) -> None:
    exchange(servers["oracle"], models["bad"])
    prompt = repetitive(3)
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}}
    answer: Any = servers["oracle"].post("/generate", body | {"return_logprob": True, "top_logprobs_num": 2})
    found = answer["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in found] == oracle.continuation(prompt[-1], TOKENS) == answer["output_ids"]
    assert accepted(answer, WIDTH) == expected_hybrid(HybridDrafts(HybridSettings()), prompt, HEADS["bad"])
    likely = math.log(oracle.probability(SCALE))
    rest = math.log((1 - oracle.probability(SCALE)) / (oracle.SIZE - 1))
    for (value, token, _), top in zip(found, answer["meta_info"]["output_top_logprobs"], strict=True):
        assert value == pytest.approx(likely, abs=0.02) and top[0][:2] == [value, token]
        assert top[1][0] == pytest.approx(rest, abs=0.05)


def test_grammar_decides_over_drafts(servers: dict[str, EngineServer], models: dict[str, Path]) -> None:
    """Every fifth token is forced to another than the model's own, in a text that repeats itself."""
    exchange(servers["oracle"], models["right"])
    text = [7]
    for i in range(20):
        text.append((oracle.PERMUTATION[text[-1]] + (i % 5 == 4)) % oracle.SIZE)
    forced = text[1:] * 2
    regex = "".join(map(oracle.character, forced)) + f"[{oracle.character(0)}-{oracle.character(255)}]*"
    answer = generate(servers["oracle"], [oracle.prompt(7)], len(forced), regex=regex)[0]
    assert answer["output_ids"] == forced
    assert answer["meta_info"]["spec_verify_ct"] < len(forced)


def test_json_of_a_schema(servers: dict[str, EngineServer]) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 2, 3]}}}
    schema |= {"required": ["name", "n"], "additionalProperties": False}
    body = {"text": "The capital of France", "sampling_params": {"temperature": 0, "json_schema": json.dumps(schema)}}
    body["sampling_params"]["max_new_tokens"] = 64
    answer: Any = servers["echo"].post("/generate", body)
    print(answer["text"], answer["meta_info"]["spec_correct_drafts_histogram"])
    assert set(json.loads(answer["text"])) == {"name", "n"}


def test_abandoned_stream_leaves_the_rest_alone(servers: dict[str, EngineServer], models: dict[str, Path]) -> None:
    exchange(servers["oracle"], models["right"])
    server = servers["oracle"]
    parameters = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
    body = {"input_ids": repetitive(3), "sampling_params": parameters, "stream": True}
    header = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{server.url}/generate", json.dumps(body).encode(), header)
    ) as s:
        assert s.readline().startswith(b"data: ")
    check_oracle(server, HEADS["right"])


def test_real_attention_gives_the_text_of_pytorch(servers: dict[str, EngineServer], cut: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cut)
    model: Any = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32)
    prompts = [tokenizer(question, add_special_tokens=False).input_ids for question in engine_checks.QUESTIONS]
    whole = rejected = 0
    for prompt, answer in zip(prompts, generate(servers["echo"], prompts), strict=True):
        with torch.inference_mode():
            chosen = model(torch.tensor([prompt + answer["output_ids"]])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert answer["output_ids"] == chosen.tolist()
        steps, by_position = accepted(answer, K)
        whole, rejected = whole + by_position[-1], rejected + steps - by_position[-1]
    print(whole, rejected)
    assert whole > 10 and rejected > 10


def test_platform_refuses_trees(cut: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, str(K), "--speculative-eagle-topk", "2", "--speculative-draft-model-path", str(cut)]
    server = ForkedServer("sglang", str(cut), tmp_path / "log", flags)
    with pytest.raises(FourfoldError, match="sglang ended with status"), server:
        pass
    assert "--speculative-eagle-topk 2 does not run on fourfold_cpu" in server.log.read_text()

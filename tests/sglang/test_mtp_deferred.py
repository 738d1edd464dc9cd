"""Steps without drafts leave the head out in SGLang, and it knows afterwards what it would have known.

Draft lengths are given, and the head is right where its KV cache is (`oracle`): an entry that is missing, or another
request's, turns its drafts into other tokens.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import engine_checks
import oracle
import pytest
import torch
from given_lengths import GivenLengths
from sglang_answers import SIZES, generate

from fourfold.common.mtp.extract import extract
from fourfold.common.serving import EngineServer, free_port

K, TOKENS = 3, 90
LENGTHS = {
    "roomy": [0] * 11 + [K] * 3,
    "crowded": [0] * 23 + [K] * 2,  # 32 positions are kept, so that some have to be read meanwhile
    "conversation": [0],
    "always": [0],  # the head reads in every step
}
CROWDED = ["--chunked-prefill-size", "32", "--max-total-tokens", "320", "--max-running-requests", "2"]
CROWDED += ["--schedule-conservativeness", "0"]
HEAD_ALONE = {"mtp": {"hybrid": {"enabled": False}}}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineServer]]:
    path = tmp_path_factory.mktemp("deferred")
    target, model = oracle.write_oracle(path / "oracle", "mimo")
    extract(model, path / "draft", "sglang")
    flags = ["--speculative-algorithm", "FOURFOLD_MTP", "--speculative-num-steps", str(K)]
    flags += ["--speculative-draft-model-path", str(path / "draft"), *SIZES]
    running = {}
    for name, lengths in LENGTHS.items():
        given = path / f"{name}.json"
        given.write_text(json.dumps(lengths))
        env = {"OMP_NUM_THREADS": "1", "FOURFOLD_CONFIG": json.dumps(HEAD_ALONE), "GIVEN_LENGTHS": str(given)}
        if name == "always":
            env["GIVEN_ALWAYS"] = "1"
        more = CROWDED if name == "crowded" else []
        port = free_port(21800 + len(running))
        running[name] = GivenLengths("sglang", str(target), path / f"{name}.log", [*flags, *more], env, port)
    with engine_checks.running(running):
        yield running


def check(prompts: list[list[int]], answers: list[Any], tokens: int = TOKENS) -> None:
    """Each draft of each answer is right."""
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["output_ids"] == oracle.continuation(prompt[-1], tokens)
        steps = answer["meta_info"]["spec_correct_drafts_histogram"]
        assert not any(steps[1:K]), steps
    drafts = [answer["meta_info"]["spec_correct_drafts_histogram"][K:] for answer in answers]
    assert all(sum(steps) > 0 for steps in drafts), drafts


def blocks(server: EngineServer) -> list[tuple[int, int, list[int]]]:
    """Of the log, in turn: a length, in how many steps it was asked for, and the passes of the head in the last.

    A pass is the number of positions read; one that only fills the cache counts below zero.
    """
    found: list[tuple[int, int, list[int]]] = []
    kinds = "LENGTH", "READ", "FILL"
    lines = [line.split() for line in server.log.read_text().splitlines() if line.split(" ")[0] in kinds]
    for (kind, value), same in groupby(lines, key=tuple):
        number, count = int(value), len(list(same))
        if kind == "LENGTH":
            found.append((number, count, []))
        elif found:
            found[-1][2].extend([number if kind == "READ" else -number] * count)
    return found


def test_a_right_head_stays_right(servers: dict[str, EngineServer]) -> None:
    """One request alone, then several of different lengths that come and go."""
    server = servers["roomy"]
    prompts = [oracle.prompt(start, length) for start, length in ((3, 4), (17, 9), (40, 5), (99, 13), (60, 30))]
    check(prompts, generate(server, prompts[:1], TOKENS) + generate(server, prompts[1:], TOKENS))
    found = [block for block in blocks(server) if block[0] == 0]
    longest = max(found, key=lambda block: block[1])
    assert longest[1] == 11 and not longest[2]  # steps without drafts of which no request ended or began


def test_a_request_that_gives_way_and_what_is_read_meanwhile(servers: dict[str, EngineServer]) -> None:
    """There is room for one of two answers, but the second begins when the first has hardly begun."""
    server, tokens = servers["crowded"], 200
    prompts = [oracle.prompt(3, 40), oracle.prompt(99, 40)]
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": False}  # else SGLang waits for the room
    body = json.dumps({"input_ids": prompts[0], "sampling_params": sampling, "stream": True}).encode()
    request = urllib.request.Request(f"{server.url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as stream, ThreadPoolExecutor(1) as pool:
        assert stream.readline().startswith(b"data: ")
        second = pool.submit(generate, server, prompts[1:], tokens, ignore_eos=False)
        last = [line for line in stream.read().decode().splitlines() if line.startswith("data: {")][-1]
        check(prompts, [json.loads(last.removeprefix("data: ")), *second.result()], tokens)
    assert "Retract requests" in server.log.read_text()
    assert any(-32 <= min(reads, default=0) < -20 for length, _, reads in blocks(server) if not length)


def entries(server: EngineServer) -> dict[int, torch.Tensor]:
    """By position, what the head stored last."""
    lines = [line.split() for line in server.log.read_text().splitlines() if line.startswith("ENTRY ")]
    return {int(position): torch.tensor([float(value) for value in values]) for _, position, *values in lines}


def test_what_a_conversation_goes_on_from_is_what_it_would_have_been(servers: dict[str, EngineServer]) -> None:
    """The answer has no drafts, and all of it is read for the prefix cache, which is asked for it afterwards."""
    first, found = oracle.prompt(5, 40), {}
    for name, passes in (("conversation", [-39]), ("always", [1])):
        server = servers[name]
        answer = generate(server, [first], 40)[0]
        assert answer["meta_info"]["spec_verify_ct"] == 39 and blocks(server)[-1][2] == passes
        found[name] = entries(server)
        assert sorted(found[name]) == list(range(79))
    late, always = (torch.stack([found[name][i] for i in range(79)]) for name in found)
    assert late[40:].std() > 1 and torch.allclose(late, always, rtol=0.02, atol=0.1)
    server = servers["conversation"]
    Path(server.env["GIVEN_LENGTHS"]).write_text(json.dumps([K]))
    second = [*first, *answer["output_ids"]]
    answers = generate(server, [second], TOKENS)
    check([second], answers)
    assert answers[0]["meta_info"]["cached_tokens"] > len(first) + 30


def test_the_log_says_that_it_is_left_out(servers: dict[str, EngineServer]) -> None:
    lines = engine_checks.fourfold_lines(servers["roomy"])
    assert any("in steps without drafts the MTP head is left out, and reads later what it missed" in x for x in lines)

"""MTP in vLLM as a server, and over two ranks: its metrics, cached prefixes, logprobs, grammars, cancelled requests.

Two servers start at once: one whose head is right, and one that drafts from text or a head that is always wrong.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_checks
import pytest
from forked_server import ForkedServer
from oracle import ORDER, PERMUTATION, SIZE, character, continuation, expected_drafts, probability, prompt, write_oracle

from fourfold.common.mtp.extract import extract
from fourfold.common.mtp.probe import read_metrics
from fourfold.common.serving import EngineServer

K, SCALE = 3, 0.4
ARGUMENTS = ["--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "4", "--enforce-eager"]


HYBRID = ["--worker-cls", "fourfold.vllm_ext.hybrid_worker.HybridWorker"]
SKEWED, FOLDER = ["--worker-cls", "skewed_worker.SkewedWorker"], str(Path(__file__).parent)
COUNTING = ["--worker-cls", "counting_worker.CountingWorker"]
FIXED = ["--additional-config", json.dumps({"fourfold": {"mtp": {"hybrid": {"learn_head": False}}}})]
MTP = ("source", "mtp")
LIMIT = 8  # tokens that the second server drafts from text


def start(
    folder: Path, *arguments: str, env: dict[str, str] | None = None, kind: str = "right", k: int = K
) -> EngineServer:
    target, model = write_oracle(folder / "oracle", heads=(kind,), scale=SCALE)
    extract(model, folder / "draft", "vllm")
    speculative = {"method": "mtp", "model": str(folder / "draft"), "num_speculative_tokens": k}
    flags = [*ARGUMENTS, "--speculative-config", json.dumps(speculative), *arguments]
    return ForkedServer("vllm", str(target), folder / "log", flags, env or {"VLLM_CPU_OMP_THREADS_BIND": "0"})


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineServer]]:
    folder = tmp_path_factory.mktemp("mtp")
    starting = {
        "right": start(folder / "right", "--block-size", "32", "--enable-prefix-caching"),
        "wrong": start(folder / "wrong", *HYBRID, *FIXED, kind="swapped", k=LIMIT),
    }
    with engine_checks.running(starting):
        yield starting


@pytest.fixture(scope="module")
def server(servers: dict[str, EngineServer]) -> EngineServer:
    return servers["right"]


def complete(server: EngineServer, text: list[int], tokens: int, **options: Any) -> dict[str, Any]:
    body = {"model": server.model, "prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", {**body, "return_token_ids": True, **options})
    return answer["choices"][0]


def counters(server: EngineServer) -> dict[str, float]:
    """vLLM's metrics by name, without the prefix; drafts accepted at a position are under its number."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^vllm:(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        position = re.search(r'position="(\d+)"', labels) if name.endswith("per_pos_total") else None
        found[position[1] if position else name] = float(value)
    return found


def counted(before: dict[str, float], after: dict[str, float]) -> tuple[int, list[int]]:
    """Steps that verified drafts, and accepted drafts by position."""
    steps, *accepted = (after[n] - before[n] for n in ("spec_decode_num_drafts_total", *map(str, range(K))))
    return int(steps), [int(n) for n in accepted]


def test_acceptance_in_the_metrics(server: EngineServer) -> None:
    before, text = counters(server), prompt(ORDER[0])
    assert complete(server, text, 40)["token_ids"] == continuation(text[-1], 40)
    assert counted(before, counters(server)) == expected_drafts(text, 40, K)


def test_a_probe_passes(server: EngineServer) -> None:
    before = counters(server)
    done = engine_checks.probe(server, "--prompts", "16", "--json")
    steps, accepted = counted(before, counters(server))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"]["ok"] and found["server"]["engine"] == "vllm" and found["server"]["k"] == K
    assert (found["measured"]["drafts"], found["measured"]["accepted"]) == (steps, accepted)
    assert found["measured"]["tokens"] == 16 * 64
    assert found["measured"]["mean_acceptance_length"] == pytest.approx(1 + sum(accepted) / steps)
    assert found["measured"]["acceptance"][0] > 0.9


def test_a_probe_finds_a_wrong_head(servers: dict[str, EngineServer]) -> None:
    done = engine_checks.probe(servers["wrong"], "--prompts", "16")
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(
        "FAIL acceptance collapsed: mean acceptance length 1.00, position 0 accepted in 0.0%; expected"
    )
    assert f"`fourfold mtp inspect {servers['wrong'].model}`" in last
    assert "source mtp: 1008 drafts, 3024 tokens, 0 accepted" in done.stdout


def test_drafts_by_source_in_the_metrics(servers: dict[str, EngineServer]) -> None:
    before = read_metrics(servers["wrong"].url)
    text = ORDER[:40] + ORDER[:10]  # goes on as before for 30 tokens
    assert complete(servers["wrong"], text, 60)["token_ids"] == continuation(text[-1], 60)
    after = read_metrics(servers["wrong"].url)
    found = {
        (name.removeprefix("fourfold:spec_").removesuffix("_total"), *dict(sorted(labels)).values()): int(value)
        for (name, labels), value in ((key, value - before.get(key, 0)) for key, value in after.items())
        if name.startswith("fourfold:") and value
    }
    # After the first token: 8 + 8 + 8 right and 2 of 8, each with the target's own token; then 29 tokens.
    positions = {("accepted_tokens", str(i), "suffix"): count for i, count in enumerate([4, 4, *[3] * 6])}
    suffix = {("drafts", "suffix"): 4, ("draft_tokens", "suffix"): 32, **positions}
    assert found == {**suffix, ("drafts", "mtp"): 29, ("draft_tokens", "mtp"): 87}


def test_a_cached_prefix_is_one_for_the_draft_too(server: EngineServer) -> None:
    text = prompt(ORDER[40], 100)
    complete(server, text[:80], 4)
    before = counters(server)
    assert complete(server, text, 40)["token_ids"] == continuation(text[-1], 40)
    after = counters(server)
    assert after["prefix_cache_hits_total"] - before["prefix_cache_hits_total"] == 32
    assert counted(before, after) == expected_drafts(text, 40, K)


def test_logprobs_are_the_targets(server: EngineServer) -> None:
    text = prompt(ORDER[80])
    choice = complete(server, text, 40, logprobs=2)
    assert choice["token_ids"] == continuation(text[-1], 40)
    found = choice["logprobs"]["token_logprobs"]
    assert len(found) == 40 and all(abs(value - math.log(probability(SCALE))) < 0.01 for value in found)


def test_a_grammar_cuts_drafts(server: EngineServer) -> None:
    allowed = [token for token in range(SIZE) if token % 4]
    text, expected = prompt(ORDER[120]), []
    for _ in range(40):
        following = PERMUTATION[[*text, *expected][-1]]
        expected.append(following if following in allowed else allowed[0])  # all others are equally likely
    before = counters(server)
    regex = f"[{''.join(map(character, allowed))}]*"
    assert complete(server, text, 40, structured_outputs={"regex": regex})["token_ids"] == expected
    steps, accepted = counted(before, counters(server))
    assert 10 < steps < 40 and 0 < accepted[0] < steps


def test_a_cancelled_stream_leaves_nothing_behind(server: EngineServer) -> None:
    texts = [prompt(ORDER[30 * i], 20) for i in range(4)]
    before = counters(server)["generation_tokens_total"]
    for text in texts[:2]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {"model": server.model, "prompt": text, "max_tokens": 1900, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        assert connection.getresponse().read(200)
        connection.close()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda text: complete(server, text, 60)["token_ids"], texts))
    assert answers == [continuation(text[-1], 60) for text in texts]
    found = counters(server)
    assert found["num_requests_running"] == found["num_requests_waiting"] == 0
    assert found["generation_tokens_total"] - before < 240 + 1900  # the cancelled ones ended


def test_two_ranks(tmp_path: Path) -> None:
    """Ranks that time steps for themselves draft different numbers of tokens, and wait for each other."""
    ranks, env = ["--tensor-parallel-size", "2"], {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "PYTHONPATH": FOLDER}
    servers = {
        "head": start(tmp_path / "head", *ranks, *COUNTING, env=env | {"VLLM_SERVER_DEV_MODE": "1"}),
        "hybrid": start(tmp_path / "hybrid", *ranks, *SKEWED, env=env, k=LIMIT),
    }
    with engine_checks.running(servers):
        before, text = counters(servers["head"]), prompt(ORDER[0])
        assert complete(servers["head"], text, 40)["token_ids"] == continuation(text[-1], 40)
        steps, accepted = counted(before, counters(servers["head"]))
        assert (steps, accepted) == expected_drafts(text, 40, K)
        asked = servers["head"].post("/collective_rpc", {"method": "messages"})["results"]
        # The drafts came with the sampled tokens.
        assert all(n["sample_tokens"] > steps and "take_draft_token_ids" not in n for n in asked) and len(asked) == 2
        texts = [(ORDER * 2)[40 * i : 40 * i + 40 + 10 * i] for i in range(4)]
        texts[0] += texts[0][:10]  # goes on as before for 30 tokens
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda text: complete(servers["hybrid"], text, 400)["token_ids"], texts))
        assert answers == [continuation(text[-1], 400) for text in texts]
        found = read_metrics(servers["hybrid"].url)
        drafted, accepted = (
            sum(n for (name, labels), n in found.items() if name == f"fourfold:spec_{which}_total" and MTP in labels)
            for which in ("draft_tokens", "accepted_tokens")
        )
        assert drafted == accepted > 0

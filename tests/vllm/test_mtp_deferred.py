"""Steps without drafts leave the head out in vLLM, and it knows afterwards what it would have known.

The same requests run with given draft lengths on vLLM's worker and on `AdaptiveWorker`. The KV cache of the head must
be the same in the end, and a head that is right must stay right whatever happened meanwhile (`oracle`): a cache entry
that is missing or another request's would show in both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import deferred_runs
import pytest
import torch
from oracle import ORDER, chi_square, continuation, probability, prompt, write_oracle

from fourfold.common.mtp.extract import extract

K, SCALE = 3, 0.4
ADAPTIVE = "fourfold.vllm_ext.mtp_scheduler.AdaptiveScheduler"
WORKER = "fourfold.vllm_ext.adaptive_worker.AdaptiveWorker"
LONG = [prompt(ORDER[40 * i], 90) for i in range(6)]
FIRST = prompt(ORDER[0], 40)
ANSWER = continuation(FIRST[-1], 60)


def request(text: list[int], tokens: int, **options: Any) -> dict[str, Any]:
    return {"prompt": list(text), "temperature": 0, "max_tokens": tokens, **options}


# Lengths, options and requests. Prompts are not read in parts but in the first, for vLLM's head reads the end of a part
# with another token than the text's.
CASES: dict[str, tuple[list[int], dict[str, Any], list[dict[str, Any]]]] = {
    "in parts": (
        [*[0] * 60, K],
        {"max_num_batched_tokens": 64},
        [request(text, 100) for text in LONG[:3]] + [request(FIRST, 60, start=9)],
    ),
    "crowded": (
        [*([0] * 23 + [K] * 2) * 20, K],
        {"block_size": 32, "num_gpu_blocks_override": 17, "max_num_batched_tokens": 256, "enable_prefix_caching": True},
        [request(text, 60, start=2 * i, **({"aborted": 19} if i == 1 else {})) for i, text in enumerate(LONG)]
        + [request(text, 20, start=150 + 2 * i) for i, text in enumerate(LONG[:3])],
    ),
    "conversation": (
        [*[0] * 80, K],
        {"block_size": 32, "num_gpu_blocks_override": 64, "enable_prefix_caching": True},
        [request(FIRST, 60), request([*FIRST, *ANSWER, ORDER[9]], 40, start=62), request(FIRST, 50, start=63)],
    ),
}
SAMPLED = [request(prompt(ORDER[7 * i]), 60, temperature=1, logprobs=0) for i in range(32)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results by case and worker, and the log under ``log``."""
    folder = tmp_path_factory.mktemp("deferred")
    target, model = write_oracle(folder / "oracle")
    unsure, unsure_model = write_oracle(folder / "unsure", scale=SCALE)
    extract(model, folder / "draft", "vllm")
    extract(unsure_model, folder / "unsure-draft", "vllm")
    cases = {}
    for name, (lengths, options, requests) in {**CASES, "sampled": ([0], {"max_num_seqs": 32}, SAMPLED)}.items():
        sampled = name == "sampled"
        draft = folder / ("unsure-draft" if sampled else "draft")
        speculative = {"method": "mtp", "model": str(draft), "num_speculative_tokens": K}
        speculative["num_speculative_tokens_per_batch_size"] = [[1, 32 if sampled else 8, K]]
        options = {"scheduler_cls": ADAPTIVE, "speculative_config": speculative, **options}
        case = {"model": str(unsure if sampled else target), "lengths": lengths, "requests": requests}
        cases[name] = {**case, "options": {**options, "worker_cls": WORKER}}
        if not sampled:
            cases[f"{name}, vLLM's"] = {**case, "options": options}
    (folder / "cases.json").write_text(json.dumps(cases))
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    with (folder / "log").open("w") as log:
        command = [sys.executable, deferred_runs.__file__, str(folder / "cases.json"), str(folder / "results.json")]
        subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **env}, check=True, timeout=900)
    results = json.loads((folder / "results.json").read_text()) | {"log": (folder / "log").read_text()}
    assert not any("error" in results[name] for name in cases), results
    return results


@pytest.mark.parametrize("name", CASES)
def test_a_right_head_stays_right(runs: dict[str, Any], name: str) -> None:
    result, (_, _, requests) = runs[name], CASES[name]
    for i, asked in enumerate(requests):
        answer = continuation(asked["prompt"][-1], asked["max_tokens"])
        found = result["tokens"].get(str(i), [])
        assert found == answer[: len(found)] and (len(found) == len(answer)) != ("aborted" in asked)
    # At the end of an answer a draft is cut.
    assert result["steps"] > 10 and result["accepted"] == [result["steps"]] * K


@pytest.mark.parametrize("name", ["crowded", "conversation"])
def test_the_heads_cache_is_what_it_would_have_been(runs: dict[str, Any], name: str) -> None:
    late, always = (runs[case] for case in (name, f"{name}, vLLM's"))
    assert late["tokens"] == always["tokens"] and late["blocks"] == always["blocks"] and len(late["blocks"]) >= 4
    found, expected = (torch.load(run["cache"]).float()[run["blocks"]] for run in (late, always))
    assert expected.abs().max() > 1 and torch.allclose(found, expected, rtol=0.02, atol=0.05)


def test_what_happened_meanwhile(runs: dict[str, Any]) -> None:
    assert runs["crowded"]["preemptions"] > 0
    assert runs["conversation"]["hits"] == 64 > len(FIRST)  # of the answer too, whose positions had not been read
    for name in CASES:
        assert runs[name]["deferred"] and not runs[f"{name}, vLLM's"]["deferred"]


def test_the_head_is_left_out(runs: dict[str, Any]) -> None:
    for name, (lengths, _, _) in CASES.items():
        stretch = lengths.index(K)
        late, always = (
            [count for step, count in runs[case]["reads"] if step < stretch] for case in (name, f"{name}, vLLM's")
        )
        assert len(always) == stretch and len(late) < 0.25 * stretch
        # What is read late fills the cache alone.
        late, always = ([step for step in runs[case]["fed"] if step < stretch] for case in (name, f"{name}, vLLM's"))
        assert len(always) == stretch and not late
    # All but what is read when drafting resumes.
    assert len(runs["sampled"]["reads"]) < 0.25 * 60


def test_samples_and_logprobs_without_drafts_are_the_targets(runs: dict[str, Any]) -> None:
    result = runs["sampled"]
    tokens = [result["tokens"][str(i)] for i in range(len(SAMPLED))]
    assert chi_square([asked["prompt"] for asked in SAMPLED], tokens, SCALE) < 88.0
    best = torch.tensor(probability(SCALE)).log()
    for asked, answer, found in zip(SAMPLED, tokens, (result["logprobs"][str(i)] for i in range(32)), strict=True):
        followed = [continuation(last, 1)[0] for last in [asked["prompt"][-1], *answer[:-1]]]
        right = [value for value, token, next_token in zip(found, answer, followed, strict=True) if token == next_token]
        assert len(right) > 20 and all(abs(value - best) < 0.01 for value in right)


def test_the_log_says_that_it_is_left_out(runs: dict[str, Any]) -> None:
    logs = {part.partition("\n")[0]: part for part in runs["log"].split("CASE ")}
    assert "in steps without drafts the MTP head is left out, and reads later what it missed" in logs["crowded"]

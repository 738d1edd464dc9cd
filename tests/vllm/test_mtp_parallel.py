"""The draft length that data-parallel ranks agree on.

One model says that it has experts, so vLLM runs its ranks in lock step, though no layer has any (vLLM's layers of
experts do not run over data-parallel ranks of a CPU). The ranks still ask each other for the size of every batch, of
the target and of the draft, so ranks of different lengths would wait for each other for ever. The head is always wrong:
the length that pays is 0, and lengths change until that is known and whenever another is probed. The ranks of the
other model are independent. Both servers start at once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_checks
import pytest
from forked_server import ForkedServer
from oracle import ORDER, continuation, prompt, write_oracle

from fourfold.common.mtp.extract import extract
from fourfold.common.serving import EngineServer

K = 3
ARGUMENTS = ["--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]
ARGUMENTS += ["--data-parallel-size", "2", "--dp-sync-interval", "2"]
ARGUMENTS += ["--scheduler-cls", "fourfold.vllm_ext.mtp_scheduler.AdaptiveScheduler"]
ARGUMENTS += ["--additional-config", json.dumps({"fourfold": {"mtp": {"adaptive_data_parallel": True}}})]
WORKER = ["--worker-cls", "fourfold.vllm_ext.adaptive_worker.AdaptiveWorker"]


def start(folder: Path, *arguments: str, experts: int = 0) -> EngineServer:
    target, model = write_oracle(folder / "oracle", heads=("swapped",))
    extract(model, folder / "draft", "vllm")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | ({"num_local_experts": experts} if experts else {})))
    speculative = {"method": "mtp", "model": str(folder / "draft"), "num_speculative_tokens": K}
    flags = [*ARGUMENTS, "--speculative-config", json.dumps(speculative), *arguments]
    return ForkedServer("vllm", str(target), folder / "log", flags, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"})


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineServer]]:
    folder = tmp_path_factory.mktemp("parallel")
    starting = {
        "lock step": start(folder / "experts", *WORKER, experts=2),
        "independent": start(folder / "dense"),
    }
    with engine_checks.running(starting):
        yield starting


def complete(server: EngineServer, text: list[int], tokens: int) -> list[int]:
    body = {"model": server.model, "prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer: Any = server.post("/v1/completions", {**body, "return_token_ids": True}, timeout=120)
    return answer["choices"][0]["token_ids"]


def check(server: EngineServer, lengths: list[int], at_once: int) -> None:
    texts = [prompt(ORDER[7 * i]) for i in range(len(lengths))]
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda text, tokens: complete(server, text, tokens), texts, lengths))
    assert answers == [continuation(text[-1], tokens) for text, tokens in zip(texts, lengths, strict=True)]


def by_engine(server: EngineServer, name: str) -> list[int]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.findall(rf'^vllm:{name}_total\{{engine="(\d)".*\}} (\S+)$', text, re.MULTILINE)
    return [int(float(value)) for _, value in sorted(found)]


def assert_learned(server: EngineServer) -> None:
    """Hold each rank to half of the drafts that a fixed length makes, in one of a few rounds, since steps are timed."""
    names = "spec_decode_num_draft_tokens", "generation_tokens"
    rounds = []
    for _ in range(4):
        before = [by_engine(server, name) for name in names]
        check(server, [150] * 8, 8)
        after = [by_engine(server, name) for name in names]
        drafted, tokens = ([b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True))
        assert sum(tokens) == 1200 and min(tokens) > 0
        rounds.append(drafted)
        if all(2 * d < K * t for d, t in zip(drafted, tokens, strict=True)):
            return
    raise AssertionError(f"drafted by each rank in rounds of 1200 tokens: {rounds}")


def test_ranks_agree_on_a_length_that_changes(servers: dict[str, EngineServer]) -> None:
    server = servers["lock step"]
    check(server, [100] * 8, 8)  # both ranks work
    check(server, [40, 90, 20], 1)  # one works, the other runs empty steps
    check(server, [200, 10, 60, 30, 120, 5], 6)  # ranks run out of work at different times
    assert min(by_engine(server, "spec_decode_num_draft_tokens")) > 0
    assert_learned(server)


def test_the_end_of_the_context_where_nothing_is_drafted(servers: dict[str, EngineServer]) -> None:
    check(servers["lock step"], [252, 252, 30], 3)


def test_the_log_says_so(servers: dict[str, EngineServer]) -> None:
    lines = engine_checks.fourfold_lines(servers["lock step"])
    assert "fourfold: 2 data-parallel ranks agree on the number of draft tokens" in lines


def test_independent_ranks_learn_each_for_itself(servers: dict[str, EngineServer]) -> None:
    check(servers["independent"], [150] * 8, 8)
    assert_learned(servers["independent"])


REFUSALS = """
import json, os, sys
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from fourfold.common.errors import FourfoldError
from fourfold.vllm_ext import mtp_scheduler

if __name__ == "__main__":
    def config(worker=mtp_scheduler.WORKER):
        options = {"worker_cls": worker, "speculative_config": json.loads(sys.argv[2]), "max_model_len": 256}
        return EngineArgs(sys.argv[1], data_parallel_size=2, **options).create_engine_config()
    good, full, elastic, other = config(), config(), config(), config("auto")
    full.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    elastic.parallel_config.enable_elastic_ep = True
    mtp_scheduler.check_ranks(good)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    for refused in (other, elastic, full, "V2"):
        if refused == "V2":
            os.environ["VLLM_USE_V2_MODEL_RUNNER"], refused = "1", good
        try:
            mtp_scheduler.check_ranks(refused)
        except FourfoldError as error:
            print("REFUSED", error)
"""


def test_what_the_ranks_could_not_keep_to_is_refused(tmp_path: Path) -> None:
    server = start(tmp_path, experts=2)
    (tmp_path / "refusals.py").write_text(REFUSALS)
    speculative = json.dumps({"method": "mtp", "model": str(tmp_path / "draft"), "num_speculative_tokens": K})
    command = [sys.executable, str(tmp_path / "refusals.py"), server.model, speculative]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("REFUSED mtp.adaptive_data_parallel: ")]
    words = ("--worker-cls is", "--enable-elastic-ep", "full CUDA graphs", "set VLLM_USE_V2_MODEL_RUNNER=0")
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True)), lines

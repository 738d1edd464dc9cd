"""The draft length that SGLang's attention-data-parallel ranks agree on.

The ranks share the experts of target and head, so ranks of different lengths would wait for each other for ever. One
server: small batches have one length each, by which ranks with different batches have to agree; larger ones
learn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import oracle
import pytest
from forked_server import ForkedServer
from oracle_mla import DEEPSEEK
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative import adaptive_spec_params
from sglang_answers import SIZES, TOKENS, accepted, exchange

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.extract import extract
from fourfold.common.serving import EngineServer, free_port
from fourfold.sglang_ext import mtp_parallel

FLAGS = ["--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1", "--speculative-num-steps", "3"]
FLAGS += ["--speculative-num-draft-tokens", "4", "--speculative-adaptive", "--tp-size", "2", "--attn-dp-size", "2"]
LENGTHS = {"1": [3], "2": [1], "4": [0, 1, 3]}  # of drafts, by the least batch
QUICK = {"ema_alpha": 0.5, "warmup_batches": 2, "update_interval": 2}
ENVIRONMENT = {
    "FOURFOLD_CONFIG": json.dumps({"mtp": {"adaptive_data_parallel": True}}),
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("oracle")
    kinds = ("right", "swapped")
    return {kind: oracle.write_oracle(path / kind, heads=(kind,), architecture=DEEPSEEK)[1] for kind in kinds}


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    path = tmp_path_factory.mktemp("server")
    extract(models["right"], path / "draft", "sglang")
    (path / "lengths").write_text(json.dumps({k: {"candidate_steps": v} | QUICK for k, v in LENGTHS.items()}))
    flags = [*FLAGS, "--speculative-adaptive-config", str(path / "lengths"), *SIZES]
    flags += ["--speculative-draft-model-path", str(path / "draft")]
    flags += ["--dtype", "float32"]
    with ForkedServer("sglang", str(models["right"]), path / "log", flags, ENVIRONMENT, free_port(21900)) as running:
        yield running


def ask(server: EngineServer, rank: int, prompts: list[list[int]], tokens: int) -> list[Any]:
    """Answers of one rank, whose text has to be the target's."""
    parameters = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": parameters, "routed_dp_rank": rank}
    answers: Any = server.post("/generate", body, timeout=120)
    for text, answer in zip(prompts, answers, strict=True):
        assert answer["output_ids"] == oracle.continuation(text[-1], tokens)
    return answers


def prompts(count: int) -> list[list[int]]:
    return [oracle.prompt(oracle.ORDER[31 * i], 4 + i) for i in range(count)]


def test_ranks_with_different_batches_draft_the_same_number(server: EngineServer) -> None:
    """By its own batch the second rank would draft 3 tokens."""
    (text,) = prompts(1)
    assert accepted(ask(server, 1, [text], TOKENS)[0], 3) == oracle.expected_drafts(text, TOKENS, 3)
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(ask, server, 0, prompts(2), 4 * TOKENS)
        while not others.done() and "steps 3 -> 1," not in server.log.read_text(errors="replace"):
            time.sleep(0.05)
        found = ask(server, 1, [text], TOKENS)[0]
        assert not others.done()
        others.result()
    assert accepted(found, 3) == (*oracle.expected_drafts(text, TOKENS, 1)[:1], [TOKENS // 2, 0, 0])


def changes(server: EngineServer) -> list[str]:
    """Of the length of large batches, as the first rank learned it."""
    lines = server.log.read_text(errors="replace").splitlines()
    return [line.split("updated: ")[1].split(" (")[0] for line in lines if "Adaptive spec params updated: " in line]


def test_a_rank_without_requests_learns_from_the_other(server: EngineServer, models: dict[str, Path]) -> None:
    exchange(server, models["swapped"])
    before = len(changes(server))
    ask(server, 1, prompts(4), TOKENS)
    found = changes(server)[before:]
    print(found)
    assert found[0].startswith("steps 3 -> ") and "steps 0 -> 1" in found and "steps 1 -> 0" in found


def test_lengths_change_while_both_work(server: EngineServer, models: dict[str, Path]) -> None:
    exchange(server, models["swapped"])
    ask(server, 0, prompts(4), 8)
    exchange(server, models["right"])
    before = len(changes(server))
    work = [(0, 4, 90), (1, 1, 30), (1, 5, 60), (0, 1, 10), (1, 2, 120), (0, 3, 40)]
    with ThreadPoolExecutor(len(work)) as pool:
        for answers in pool.map(lambda of: ask(server, of[0], prompts(of[1]), of[2]), work):
            assert answers
    found = changes(server)[before:]
    print(found)
    assert "steps 1 -> 3" in found or "steps 0 -> 1" in found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap: "),
        ({"enable_pdmux": True}, "--enable-pdmux: "),
        ({"elastic_ep_backend": "mooncake"}, "--elastic-ep-backend: "),
        ({"pp_size": 2}, "--pp-size 2: "),
        ({"speculative_eagle_topk": 4}, "speculative_eagle_topk=4 "),
        ({"speculative_algorithm": "FOURFOLD_MTP"}, "speculative_algorithm=FOURFOLD_MTP "),
        ({"variable": "SGLANG_SCHEDULER_SKIP_ALL_GATHER"}, "SGLANG_SCHEDULER_SKIP_ALL_GATHER=1: "),
    ],
)
def test_what_the_ranks_could_not_keep_to_is_refused(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable := options.pop("variable", None):
        monkeypatch.setenv(variable, "1")
    mtp_parallel.register()
    arguments = {"model_path": "model", "speculative_algorithm": "EAGLE", "tp_size": 2, "attn_dp_size": 2}

    def reason(**options: Any) -> str | None:
        return adaptive_spec_params.adaptive_unsupported_reason(ServerArgs(**arguments | options))

    with pytest.raises(FourfoldError, match=f"mtp.adaptive_data_parallel: {words}"):
        reason(**options)
    if not variable:
        assert reason() is None

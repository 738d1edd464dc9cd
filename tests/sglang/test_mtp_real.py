"""SmolLM2 and the head that was trained for it in SGLang: the answers are those without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import real_head
from forked_server import ForkedServer
from real_head import K

from fourfold.common.mtp.engines import WORDS
from fourfold.common.mtp.extract import extract
from fourfold.common.serving import EngineServer

TOKENS, AT_ONCE = 12, 50
SIZES = ["--context-length", "768", "--max-total-tokens", "16384", "--dtype", "float32", "--disable-radix-cache"]


@pytest.fixture(scope="module")
def runs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The answers without and with speculation."""
    folder = tmp_path_factory.mktemp("real")
    draft = folder / "draft"
    extract(real_head.HEAD, draft, "sglang")
    speculative = ["--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1"]
    speculative += ["--speculative-num-steps", str(K), "--speculative-num-draft-tokens", str(K + 1)]
    speculative += ["--speculative-draft-model-path", str(draft), "--speculative-token-map", str(draft / WORDS)]
    found = {}
    for name, more in (("plain", []), ("MTP", speculative)):
        with ForkedServer("sglang", str(smollm2), folder / f"{name}.log", [*SIZES, *more]) as server:
            found[name] = ask(server, real_head.prompts(smollm2))
    return found


def ask(server: EngineServer, prompts: list[list[int]]) -> list[Any]:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    answers: list[Any] = []
    for i in range(0, len(prompts), AT_ONCE):
        answers += server.post("/generate", {"input_ids": prompts[i : i + AT_ONCE], "sampling_params": sampling})
    return answers


def test_a_hundred_answers_are_those_without_speculation(runs: dict[str, list[Any]]) -> None:
    plain, speculative = ([answer["output_ids"] for answer in answers] for answers in runs.values())
    assert len(plain) == 100 and all(len(answer) == TOKENS for answer in plain)
    assert real_head.differing(plain, speculative) == []
    steps = sum(answer["meta_info"]["spec_verify_ct"] for answer in runs["MTP"])
    assert steps < 0.9 * 100 * TOKENS, steps  # of what the head drafts, some is accepted

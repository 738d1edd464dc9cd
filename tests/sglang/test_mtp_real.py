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

TOKENS, AT_ONCE, FEW = 12, 50, 40
SIZES = ["--context-length", "768", "--max-total-tokens", "16384", "--disable-radix-cache"]


@pytest.fixture(scope="module")
def asked(smollm2: Path) -> list[list[int]]:
    return real_head.prompts(smollm2)


@pytest.fixture(scope="module")
def runs(smollm2: Path, asked: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The answers without and with speculation, to a hundred prompts in float32 and a few in BF16."""
    folder = tmp_path_factory.mktemp("real")
    draft = folder / "draft"
    extract(real_head.HEAD, draft, "sglang")
    speculative = ["--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1"]
    speculative += ["--speculative-num-steps", str(K), "--speculative-num-draft-tokens", str(K + 1)]
    speculative += ["--speculative-draft-model-path", str(draft), "--speculative-token-map", str(draft / WORDS)]
    found = {}
    for dtype, count in (("float32", 100), ("bfloat16", FEW)):
        for name, more in ((dtype, []), (f"{dtype} MTP", speculative)):
            flags = [*SIZES, "--dtype", dtype, *more]
            with ForkedServer("sglang", str(smollm2), folder / f"{name}.log", flags) as server:
                found[name] = ask(server, asked[:count])
    return found


def ask(server: EngineServer, prompts: list[list[int]]) -> list[Any]:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    answers: list[Any] = []
    for i in range(0, len(prompts), AT_ONCE):
        answers += server.post("/generate", {"input_ids": prompts[i : i + AT_ONCE], "sampling_params": sampling})
    return answers


def tokens(answers: list[Any]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def assert_drafts_are_used(answers: list[Any]) -> None:
    steps = sum(answer["meta_info"]["spec_verify_ct"] for answer in answers)
    assert 0 < steps < 0.9 * len(answers) * TOKENS, steps  # of what the head drafts, some is accepted


def test_a_hundred_answers_are_those_without_speculation(runs: dict[str, list[Any]]) -> None:
    plain = tokens(runs["float32"])
    assert len(plain) == 100 and all(len(answer) == TOKENS for answer in plain)
    assert real_head.differing(plain, tokens(runs["float32 MTP"])) == []
    assert_drafts_are_used(runs["float32 MTP"])


def test_answers_in_bf16_part_at_near_ties_only(
    runs: dict[str, list[Any]], smollm2: Path, asked: list[list[int]]
) -> None:
    plain, speculative = (tokens(runs[name]) for name in ("bfloat16", "bfloat16 MTP"))
    parted = real_head.assert_near_ties(real_head.target(smollm2), asked, plain, speculative)
    print(f"{parted} of {FEW} answers part at a near-tie")
    assert parted < 0.75 * FEW
    assert_drafts_are_used(runs["bfloat16 MTP"])

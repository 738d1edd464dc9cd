"""SGLang, started as a user starts it, on SmolLM2 in NVFP4, against PyTorch and against vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_checks
import pytest

from fourfold.common.serving import EngineServer

ARGUMENTS = ["--quantization", "fourfold_nvfp4", "--dtype", "bfloat16", "--context-length", "512", "--sleep-on-idle"]


@pytest.fixture(scope="module")
def server(smollm2_nvfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    log = tmp_path_factory.mktemp("log") / "log"
    with EngineServer("sglang", str(smollm2_nvfp4), log, [*ARGUMENTS, "--max-total-tokens", "4096"]) as running:
        yield running


@pytest.fixture(scope="module")
def reference(smollm2: Path, smollm2_nvfp4: Path) -> Any:
    return engine_checks.reference_model(smollm2_nvfp4, smollm2)


@pytest.fixture(scope="module")
def answers(server: EngineServer, smollm2: Path) -> list[engine_checks.Answer]:
    return engine_checks.ask(server, smollm2, at_once=4)


def test_answers_agree_with_pytorch(answers: list[engine_checks.Answer], reference: Any) -> None:
    engine_checks.check(answers, reference)


def test_answers_agree_with_vllm(answers: list[engine_checks.Answer], reference: Any) -> None:
    engine_checks.check_between(answers, engine_checks.saved("vllm"), reference)


def test_chat(server: EngineServer) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": server.model, "messages": messages, "max_tokens": 24, "temperature": 0}
    assert "Paris" in server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]


def test_log_says_what_serves(server: EngineServer) -> None:
    served = next(line for line in engine_checks.fourfold_lines(server) if line.startswith("fourfold: nvfp4"))
    assert served.startswith("fourfold: nvfp4 w4a16, backend cpu (")
    assert "for 120 layers (down_proj, gate_up_proj, o_proj, qkv_proj)" in served
    assert served.endswith("weights of the checkpoint (compressed-tensors)")

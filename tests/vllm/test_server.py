"""vLLM, started as a user starts it, on SmolLM2 in NVFP4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import engine_checks
import pytest

from fourfold.common.serving import EngineServer

ARGUMENTS = ["--quantization", "fourfold_nvfp4", "--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager"]


@pytest.fixture(scope="module")
def server(smollm2_nvfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    with EngineServer("vllm", str(smollm2_nvfp4), tmp_path_factory.mktemp("log") / "log", ARGUMENTS) as running:
        yield running


def test_answers_agree_with_pytorch(server: EngineServer, smollm2: Path, smollm2_nvfp4: Path) -> None:
    answers = engine_checks.ask(server, smollm2, at_once=4)
    engine_checks.save(answers, "vllm")
    engine_checks.check(answers, engine_checks.reference_model(smollm2_nvfp4, smollm2))


def test_chat(server: EngineServer) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": server.model, "messages": messages, "max_tokens": 24, "temperature": 0}
    assert "Paris" in server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]


def test_log_says_what_serves(server: EngineServer) -> None:
    lines = engine_checks.fourfold_lines(server)
    assert "fourfold: registered --quantization fourfold_nvfp4" in lines
    served = next(line for line in lines if line.startswith("fourfold: nvfp4"))
    assert served.startswith("fourfold: nvfp4 w4a16, backend cpu (")
    assert "for 120 layers (down_proj, gate_up_proj, o_proj, qkv_proj)" in served
    assert served.endswith("weights of the checkpoint (compressed-tensors)")


def test_a_probe_says_what_a_server_without_speculation_lacks(server: EngineServer) -> None:
    done = engine_checks.probe(server)
    assert (
        done.returncode == 2
        and f"{server.url} (vLLM) does not speculate: start it with --speculative-config" in done.stderr
    )

"""vLLM, started as a user starts it, on SmolLM2 in NVFP4."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import engine_checks
import pytest
import stack_faults

from fourfold.common.serving import EngineServer

ARGUMENTS = ["--quantization", "fourfold_nvfp4", "--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager"]
ARGUMENTS += ["--worker-extension-cls", "stack_faults.Extension"]
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(stack_faults.__file__).parent)}


@pytest.fixture(scope="module")
def server(smollm2_nvfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    log = tmp_path_factory.mktemp("log") / "log"
    with EngineServer("vllm", str(smollm2_nvfp4), log, ARGUMENTS, ENVIRONMENT) as running:
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


def test_the_worker_has_room_on_the_data_stack(server: EngineServer) -> None:
    ((here, elsewhere),) = server.post("/collective_rpc", {"method": "stack_faults"})["results"]
    assert here < stack_faults.CALLS / 10
    assert elsewhere >= stack_faults.CALLS or sys.version_info >= (3, 13)  # which may keep a chunk for the next call


def test_a_probe_says_what_a_server_without_speculation_lacks(server: EngineServer) -> None:
    done = engine_checks.probe(server)
    assert (
        done.returncode == 2
        and f"{server.url} (vLLM) does not speculate: start it with --speculative-config" in done.stderr
    )

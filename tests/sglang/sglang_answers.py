"""Questions to a running SGLang server, and what it counted of the drafts of an answer (tests only)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.serving import EngineServer

TOKENS = 48  # of an answer
SIZES = ["--context-length", "512", "--max-total-tokens", "4096", "--sleep-on-idle"]


def generate(server: EngineServer, prompts: list[list[int]], tokens: int = TOKENS, **sampling: Any) -> list[Any]:
    parameters = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True} | sampling
    return server.post("/generate", {"input_ids": prompts, "sampling_params": parameters})  # type: ignore[return-value]


def accepted(answer: Any, positions: int) -> tuple[int, list[int]]:
    """What `oracle.expected_drafts` returns, as SGLang counted it: (steps, accepted by position)."""
    steps = answer["meta_info"]["spec_correct_drafts_histogram"]
    return answer["meta_info"]["spec_verify_ct"], [sum(steps[i + 1 :]) for i in range(positions)]


def exchange(server: EngineServer, model: Path) -> None:
    """Load the weights of target and head from ``model``, and forget what was cached."""
    for _ in range(40):
        try:
            server.post("/update_weights_from_disk", {"model_path": str(model)})
            return
        except FourfoldError as error:  # the last request is not cleared away yet
            if "requests are still running" not in str(error):
                raise
            time.sleep(0.25)
    raise AssertionError("the server never became idle")

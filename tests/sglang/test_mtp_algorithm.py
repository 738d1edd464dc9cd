"""``FOURFOLD_MTP`` in SGLang's registry: EAGLE's answers, the options that it completes, those that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.arg_groups.overrides import record_foreign_defaults, resolved_view
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from fourfold.common.errors import FourfoldError
from fourfold.common.settings import ALGORITHM
from fourfold.sglang_ext import mtp_algorithm, plugin


@pytest.fixture(scope="module")
def algorithm() -> Any:
    assert plugin.register() and plugin.register()
    mtp_algorithm.register()  # as in a process that SGLang gave the registry
    return SpeculativeAlgorithm.from_string(ALGORITHM.lower())


def test_answers_are_those_of_eagle(algorithm: Any) -> None:
    """All but the name: SGLang's class for registered algorithms says no where EAGLE says yes, or nothing."""
    eagle: Any = SpeculativeAlgorithm.EAGLE
    questions = [name for name in vars(SpeculativeAlgorithm) if name.startswith(("is_", "supports_", "has_", "need"))]
    questions.append("carries_draft_hidden_states")
    assert len(questions) > 15
    for question in questions:
        assert getattr(algorithm, question)() == getattr(eagle, question)(), question


def resolved(algorithm: Any, **options: Any) -> Any:
    arguments = ServerArgs(model_path="model", speculative_algorithm=ALGORITHM, **options)
    record_foreign_defaults(arguments, "test", algorithm.handle_server_args)
    return resolved_view(arguments)


def test_open_options_are_completed(algorithm: Any) -> None:
    found = resolved(algorithm, speculative_draft_model_path="draft", speculative_num_steps=6)
    assert (found.speculative_num_steps, found.speculative_num_draft_tokens) == (6, 7)
    assert (found.speculative_eagle_topk, found.max_running_requests) == (1, 48)
    assert resolved(algorithm, speculative_draft_model_path="draft").speculative_num_steps == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs --speculative-draft-model-path"),
        ({"speculative_use_rejection_sampling": True}, "--speculative-use-rejection-sampling does not run with"),
        ({"enable_multi_layer_eagle": True}, "--enable-multi-layer-eagle does not run with"),
        ({"speculative_eagle_topk": 4}, "--speculative-eagle-topk 4: FOURFOLD_MTP drafts a chain of 3 tokens; use 1"),
        ({"speculative_num_steps": 5, "speculative_num_draft_tokens": 4}, "tokens; use 6"),
    ],
)
def test_options_are_refused(algorithm: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(FourfoldError, match=words):
        resolved(algorithm, **(({"speculative_draft_model_path": "draft"} | options) if options else {}))

"""How many tokens the head of ``FOURFOLD_MTP`` drafts: learned, none among them, beside those of the texts.

SGLang prepares one set of attention backends and CUDA graphs for each length that its ``AdaptiveController`` may set;
here these are the lengths of the head, 0 to ``head_tokens``, and that of a text's draft. A step without a draft from a
text verifies what `DraftLength` chose for its batch size; one with such a draft verifies the longest, as the rows of a
batch are equally long. Only the former tell what a length costs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from fourfold.common.mtp.draft_length import DraftLength, Policy

_PENDING = 8  # more steps than any scheduler launches ahead


def slowest_rank(seconds: float) -> float:
    """``seconds`` of the slowest tensor-parallel rank, so that all choose the same."""
    group = get_tp_group()
    if group.world_size == 1:
        return seconds
    slowest = torch.tensor(seconds, dtype=torch.float64)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX, group.cpu_group)
    return slowest.item()


@dataclass(frozen=True)
class _Step:
    """A verification: ``head`` tokens drafted for each of ``requests`` but those in ``texts``, which are rows."""

    requests: int
    head: int
    texts: frozenset[int]
    steady: bool  # nothing but decode steps before


class LearnedLength:
    """SGLang's ``AdaptiveSpecPolicy``, told before each step whether texts draft.

    Args:
        longest: tokens of the longest draft, from a text or the head.
        most: tokens of the head's longest draft.
        agree: of a step's seconds on this rank, those that all ranks learn from.
    """

    def __init__(self, longest: int, most: int, agree: Callable[[float], float] = slowest_rank) -> None:
        self.candidate_steps = sorted({*range(most + 1), longest})
        self._longest, self._width = longest, longest
        self._head, self._agree = most, agree
        self._length = DraftLength(Policy(most))
        self._steps: deque[_Step] = deque(maxlen=_PENDING)
        self._decodes = False  # the last step did
        self._graphs: list[int] | None = None
        self._since = 0.0

    def prefill(self) -> None:
        """Take note of a step that reads prompts."""
        self._decodes = False

    def plan(self, requests: int, texts: Collection[int]) -> int:
        """Choose the length of a step, in which texts draft for the rows ``texts``; returns the head's tokens."""
        if not texts:
            self._head = self._width = self._length.choose(requests)
        else:
            self._width = self._longest
        # The first token is there anyway: the head reads each verified token at once.
        head = max(self._head, 1) if texts else self._head
        self._steps.append(_Step(requests, head, frozenset(texts), self._decodes))
        self._decodes = True
        return head

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._graphs = cuda_graph_bs

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        """Any batch may draft any length."""
        return self._graphs

    def get_steps_for_batch(self, batch_size: int) -> int:
        """The length that was planned."""
        return self._width

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> None:
        """Learn from the oldest step; SGLang calls this for each in turn, with the accepted drafts of each row."""
        now = time.perf_counter()
        since, self._since = self._since, now
        step = self._steps.popleft() if self._steps else None
        if step is None or step.requests != len(num_correct_drafts_per_req):
            self._steps.clear()
            return
        # What fills a row may have been right as well.
        head = [
            (step.head, min(good, step.head))
            for row, good in enumerate(num_correct_drafts_per_req)
            if row not in step.texts
        ]
        seconds = self._agree(now - since) if step.steady and not step.texts else None
        self._length.observe(step.requests, step.head, head, seconds)


def fixed_reason(server_args: Any, draft_config: Any) -> str | None:
    """Why SGLang cannot change the number of verified tokens here; None where it can.

    Args:
        draft_config: ``hf_config`` of the draft model.
    """
    eagle: Any = SpeculativeAlgorithm.EAGLE
    if eagle.get_platform_worker_cls() is not None:
        return "this platform has an EAGLE worker of its own"
    if is_dp_attention_enabled():
        return "with attention data parallelism ranks would draft different numbers"
    for name in ("enable_two_batch_overlap", "enable_pdmux", "enable_hisparse"):
        if getattr(server_args, name):
            return f"--{name.replace('_', '-')} prepares for one length"
    for config in (draft_config, getattr(draft_config, "text_config", None)):
        if getattr(config, "index_share_for_mtp_iteration", False):
            return "a draft's steps share their sparse indices (index_share_for_mtp_iteration)"
    return None

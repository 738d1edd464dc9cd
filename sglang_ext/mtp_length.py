"""How many tokens the head of ``FOURFOLD_MTP`` drafts: learned, none among them, beside those of the texts.

SGLang prepares one set of attention backends and CUDA graphs for each length that its ``AdaptiveController`` may set;
here these are the lengths of the head, 0 to ``head_tokens``, and for texts the powers of two above, up to
``--speculative-num-steps``. A step without a draft from a text verifies what `DraftLength` chose for its batch size; in
one with such drafts, where all rows are as long as the longest, `TextWidth` chooses.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from fourfold.common.mtp.agreement import slowest
from fourfold.common.mtp.draft_length import DraftLength, Policy
from fourfold.common.mtp.text_width import TextWidth

_PENDING = 8  # more steps than any scheduler launches ahead


@dataclass(frozen=True)
class _Step:
    """A verification of ``width`` tokens of each request: ``texts`` of those rows, ``head`` of the others."""

    requests: int
    width: int
    head: int
    texts: Mapping[int, int]
    steady: bool  # it decodes, as the one before, and reads nothing late


class LearnedLength:
    """SGLang's ``AdaptiveSpecPolicy``, told before each step what texts draft.

    Args:
        longest: tokens of the longest draft, from a text or the head.
        most: tokens of the head's longest draft.
        agree: of a step's seconds on this rank, those that all ranks learn from; the slowest tensor-parallel rank's
            where not given.

    Attributes:
        defers: the head is left out of steps without drafts, and reads what it missed in the first that drafts again.
    """

    def __init__(self, longest: int, most: int, agree: Callable[[float], float] | None = None) -> None:
        self._most = most
        self._agree = agree or (lambda seconds: slowest(seconds, get_tp_group().cpu_group))
        self._head, self._width = most, longest
        self._length = DraftLength(Policy(most))
        widths = [w for w in (1 << i for i in range(longest.bit_length())) if most < w < longest]
        self._texts = TextWidth(self._length, [*widths, longest])
        self.candidate_steps = sorted({*range(most + 1), *widths, longest})
        self._steps: deque[_Step] = deque(maxlen=_PENDING)
        self._decodes = False  # the last step did
        self.defers = False
        self._graphs: list[int] | None = None
        self._since = 0.0

    def prefill(self) -> None:
        """Take note of a step that reads prompts."""
        self._decodes = False

    def plan(self, requests: int, texts: Mapping[int, int]) -> tuple[int, int]:
        """Choose what a step verifies; ``texts`` has the length of the texts' drafts by row.

        Returns:
            Tokens that the head drafts for rows without another draft, and those verified of a text's; of these none
            where the head's are worth more.
        """
        missed = self.defers and not self._width
        # Beside texts the head drafts all or, where it drafts little alone, its first token, which is there anyway: it
        # reads each verified token at once. SGLang's CUDA graphs draft as many tokens as they were captured with.
        head = self._most if self._head > 1 else 1
        width = self._texts.choose(requests, list(texts.values()), head) if texts else None
        if width is None:
            texts = {}
            head = self._head = width = self._length.choose(requests)
        self._width = width
        texts = {row: min(length, width) for row, length in texts.items()}
        self._steps.append(_Step(requests, width, head, texts, self._decodes and not (missed and width)))
        self._decodes = True
        return head, width if texts else 0

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
        head: list[tuple[int, int]] = []
        for row, good in enumerate(num_correct_drafts_per_req):  # what fills a row may have been right as well
            if drafted := step.texts.get(row):
                self._texts.observe(drafted, min(good, drafted))
            else:
                head.append((step.head, min(good, step.head)))
        seconds = self._agree(now - since) if step.steady else None
        if not step.texts:
            self._length.observe(step.requests, step.head, head, seconds)
            return
        # The head may not have run: that is no time of a length that it drafts.
        self._length.observe(step.requests, step.head, head)
        if seconds is not None:
            self._texts.timed(step.requests, step.width, seconds)


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

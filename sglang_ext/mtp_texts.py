"""The text of SGLang's requests for `HybridDrafts`, and the count of both sources' drafts.

SGLang knows the verified text of a request once it has processed a step. Under its overlap scheduler that is after the
next step was launched: then the tokens are read from the device, one synchronisation a step. A request whose text is
not known to the last token gets no suffix draft: long prompts are read `READ` tokens a step, so that they do not hold
up the batch. With ``hybrid.enabled`` false nothing is read and the head drafts all.

The counts by source are a log line a minute, and `metrics` with ``--enable-metrics``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.runtime_context import get_parallel

from fourfold.common.log import get_logger
from fourfold.common.mtp import metrics
from fourfold.common.mtp.hybrid import READ, HybridDrafts
from fourfold.common.settings import settings_from_env

_LOG_SECONDS = 60.0
_PENDING = 8  # more steps than any scheduler launches ahead


class _Text:
    """The tokens of a request, in parts, sliced as one sequence."""

    def __init__(self, *parts: Sequence[int]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: slice) -> list[int]:
        start, stop, _ = index.indices(len(self))
        out: list[int] = []
        for part in self.parts:
            out.extend(part[max(start, 0) : max(stop, 0)])
            start, stop = start - len(part), stop - len(part)
        return out


@dataclass
class _Step:
    """A verification: (request, drafted tokens) for each row, and its output on the device."""

    rows: list[tuple[str, int]]
    output: Any = None
    counted: bool = False


class TextDrafts:
    """The suffix drafts of a worker's requests."""

    def __init__(self) -> None:
        self._settings = settings_from_env().mtp.hybrid
        self._drafts = HybridDrafts(self._settings)
        self._read: dict[str, int] = {}  # tokens read of each request's text
        self._steps: deque[_Step] = deque(maxlen=_PENDING)
        self._reports = get_parallel().attn_tp_rank == 0  # the others draft the same
        self._due = time.monotonic()
        if self._reports:
            metrics.enable()

    def propose(self, batch: Any, width: int) -> dict[int, list[int]]:
        """The suffix drafts of at most ``width`` tokens, by row of ``batch``, which is about to be verified."""
        return self._suffixes(batch, width) if self._settings.enabled and not batch.forward_mode.is_idle() else {}

    def withdraw(self, batch: Any, rows: Iterable[int]) -> None:
        """The suffix drafts of ``rows`` are not verified: their next draft is the head's."""
        for row in rows:
            self._drafts.propose(batch.reqs[row].rid, 0)

    def begin(self, batch: Any, drafts: Mapping[int, Sequence[int]], head: int) -> None:
        """Take note of what ``batch`` verifies: ``drafts``, and ``head`` tokens of each other row."""
        if not batch.forward_mode.is_idle():
            self._steps.append(_Step([(r.rid, len(drafts.get(i, ())) or head) for i, r in enumerate(batch.reqs)]))

    def verifying(self, result: Any) -> None:
        """Take note of the output of the step launched last; its tokens may not be there yet."""
        if self._steps:
            # The tensors themselves: SGLang exchanges those of ``result`` for copies that arrive later.
            self._steps[-1].output = result.next_token_ids, result.accept_lens, result.speculative_num_draft_tokens

    def verified(self, accepted: Sequence[int]) -> None:
        """Count the oldest step: SGLang calls this for each in turn, with the accepted drafts of each row."""
        if self._steps:
            step = self._steps.popleft()
            if len(step.rows) != len(accepted):
                self._steps.clear()
            elif not step.counted:
                self._count(step, accepted)

    def _suffixes(self, batch: Any, width: int) -> dict[int, list[int]]:
        unprocessed = self._unprocessed()
        requests = [request.rid for request in batch.reqs]
        self._drafts.retain(requests)
        self._read = {request: self._read.get(request, 0) for request in requests}
        drafts: dict[int, list[int]] = {}
        lengths, last, left = batch.seq_lens.tolist(), batch.spec_info.bonus_tokens.tolist(), READ
        for row, (request, length, token) in enumerate(zip(batch.reqs, lengths, last, strict=True)):
            text = _Text(request.origin_input_ids, request.output_ids)
            missing = length + 1 - len(text)
            if missing > 0:
                run = unprocessed.get(request.rid, ())
                text = _Text(*text.parts, run if len(run) == missing else [token])
            before = self._read[request.rid]
            now = self._read[request.rid] = min(len(text), before + left)
            left -= max(now - before, 0)
            whole = now == len(text) == length + 1
            self._drafts.observe(request.rid, text if whole else _Text(text[:now]))
            draft = self._drafts.propose(request.rid, width if whole else 0)
            # Images stand in the text as numbers that are no tokens.
            if any(not 0 <= token < batch.model_config.vocab_size for token in draft):
                draft = self._drafts.propose(request.rid, 0)
            if draft:
                drafts[row] = draft
        return drafts

    def _unprocessed(self) -> dict[str, list[int]]:
        """The verified tokens of the step before, by request, if SGLang has not processed it yet; counts it."""
        if not self._steps or self._steps[-1].output is None:
            return {}
        step = self._steps[-1]
        tokens, lengths, stride = step.output
        tokens, lengths = tokens.tolist(), lengths.tolist()
        if not step.counted:
            self._count(step, [length - 1 for length in lengths])
        rows = zip(step.rows, range(0, len(tokens), stride), lengths, strict=True)
        return {request: tokens[start : start + length] for (request, _), start, length in rows}

    def _count(self, step: _Step, accepted: Sequence[int]) -> None:
        step.counted = True
        for (request, drafted), right in zip(step.rows, accepted, strict=True):
            right = min(right, drafted)  # what fills a row may have been right as well
            if self._settings.enabled:
                self._drafts.verified(request, drafted, right)
            else:
                self._drafts.record("mtp", drafted, right)
        if self._reports:
            self._report()

    def _report(self) -> None:
        totals = self._drafts.totals()
        metrics.publish(totals)
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _LOG_SECONDS
            parts = (f"{t.accepted} of {t.drafted} tokens of {t.drafts} drafts by {s}" for s, t in totals.items())
            get_logger(__name__).info("fourfold: accepted so far: %s", "; ".join(parts))

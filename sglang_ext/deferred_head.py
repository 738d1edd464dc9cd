"""What steps of ``FOURFOLD_MTP`` that draft nothing leave out: the head.

SGLang runs the head in every step, over the verified tokens, since the head's KV cache needs them; with
``SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND`` it never reads those of steps without drafts. `DeferredHead` stores their
hidden states, and the head reads them together: before a step that drafts, before the prefix cache takes over what a
request holds, and when the room for them is used up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.moe.utils import speculative_moe_a2a_backend_context, speculative_moe_backend_context
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_disagg, get_parallel, get_schedule, get_spec
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput
from sglang.srt.speculative.spec_utils import draft_tp_context

_PROMPT = 2048  # positions, where SGLang does not read prompts in parts


def obstacle(runner: Any) -> str:
    """Why the head of ``runner``, SGLang's draft model, must read in every step; empty where it need not."""
    reasons = {
        "overlap scheduling goes on before it is known which requests end; --disable-overlap-schedule would": (
            not get_schedule().disable_overlap_schedule
        ),
        "the KV cache is transferred": get_disagg().disaggregation_mode != "null",
        "pipeline stages draft a step ahead": get_parallel().pp_size > 1,
        "the KV cache is split over ranks": get_parallel().dcp_enabled,
        "rejection sampling needs probabilities of each draft": get_spec().speculative_use_rejection_sampling,
        "not with sliding windows": runner.is_hybrid_swa,
        "not with images": runner.model_config.model_is_mrope,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def capacity() -> int:
    """Positions to keep: what SGLang reads at once of prompts, and one of each running request."""
    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size or 0
    return max(chunk if chunk > 0 else _PROMPT, schedule.max_running_requests or 0)


@dataclass
class _Unread:
    """Positions of a request from ``start`` on, and the rows of their hidden states."""

    request: Any
    start: int
    rows: list[int] = field(default_factory=list)


class DeferredHead:
    """The positions that the head has yet to read.

    Args:
        worker: SGLang's draft worker.
        capacity: positions, at least one for each running request.
        stub: gives the result of a step what SGLang passes on of a head that did not run.
    """

    def __init__(self, worker: Any, capacity: int, stub: Callable[[Any, Any], None]) -> None:
        self._worker, self._capacity, self._stub = worker, capacity, stub
        self._states: Any = None  # [capacity, hidden], and the tokens after them
        self._tokens: Any = None
        self._count = 0
        self._unread: dict[str, _Unread] = {}
        self._batch: Any = None
        self._cache: Any = None

    def defer(self, batch: Any, result: Any) -> None:
        """Take what ``batch`` verified, one token of each request, instead of the head."""
        states, tokens = result.logits_output.hidden_states, result.next_token_ids
        if self._states is None:
            self._states = states.new_empty(self._capacity, states.shape[1])
            self._tokens = tokens.new_empty(self._capacity)
        self._listen(batch.tree_cache)
        self._batch = copy(batch)
        if self._count + len(states) > self._capacity:
            self._read_all(batch.reqs, drafting=False)
        end = self._count + len(states)
        self._states[self._count : end], self._tokens[self._count : end] = states, tokens
        for row, request, length in zip(range(self._count, end), batch.reqs, batch.seq_lens.tolist(), strict=True):
            self._unread.setdefault(request.rid, _Unread(request, length)).rows.append(row)
        self._count = end
        self._stub(batch, result)

    def resume(self, batch: Any) -> None:
        """Read what the requests of ``batch`` lack, and give each the first token of its draft."""
        places = [row for row, request in enumerate(batch.reqs) if request.rid in self._unread]
        output = self._read_all(batch.reqs, drafting=True)
        if output is not None:
            draft = batch.spec_info
            draft.topk_index[places] = output.next_token_logits.argmax(-1, keepdim=True)
            draft.topk_p[places] = 1
            draft.hidden_states[places] = output.hidden_states

    def forget(self, requests: Iterable[Any]) -> None:
        """The prompts of ``requests`` are read, with what else there is of their text."""
        for request in requests:
            self._unread.pop(request.rid, None)

    def _read_all(self, requests: Sequence[Any], drafting: bool) -> Any:
        """Read what ``requests`` lack, in their order, and drop the rest: no other is being answered."""
        unread = [self._unread[request.rid] for request in requests if request.rid in self._unread]
        output = self._read(unread, drafting) if unread else None
        self._unread.clear()
        self._count = 0
        return output

    def _listen(self, cache: Any) -> None:
        """Let the head read what a request lacks before ``cache`` offers it to others."""
        if cache is self._cache or not cache.supports_prefix_sharing():
            return
        self._cache, checkpoint = cache, cache.checkpoint

        def read_first(req: Any, *args: Any, **kwargs: Any) -> Any:
            if unread := self._unread.pop(req.rid, None):
                self._read([unread], drafting=False)
            return checkpoint(req, *args, **kwargs)

        cache.checkpoint = read_first

    @torch.inference_mode()
    def _read(self, unread: Sequence[_Unread], drafting: bool) -> Any:
        """Let the head read; with ``drafting``, SGLang's ``LogitsProcessorOutput`` of the last position of each."""
        runner, batch = self._worker.draft_runner, copy(self._batch)
        device = self._states.device
        rows = torch.tensor([row for part in unread for row in part.rows], device=device)
        batch.reqs = [part.request for part in unread]
        batch.prefix_lens = [part.start for part in unread]
        batch.extend_lens = [len(part.rows) for part in unread]
        batch.extend_num_tokens = len(rows)
        batch.extend_logprob_start_lens = [0] * len(unread)
        batch.forward_mode = ForwardMode.EXTEND
        batch.input_ids = self._tokens[rows].to(torch.int64)  # at each position, the token after it
        lengths = [part.start + len(part.rows) for part in unread]
        batch.seq_lens_cpu, batch.seq_lens_sum = torch.tensor(lengths), sum(lengths)
        batch.seq_lens = batch.seq_lens_cpu.to(device)
        batch.orig_seq_lens = batch.seq_lens.to(torch.int32)
        places = [request.kv.req_pool_idx for request in batch.reqs]
        batch.req_pool_indices = torch.tensor(places, device=device)
        table = batch.req_to_token_pool.req_to_token
        spans = zip(places, batch.prefix_lens, lengths, strict=True)
        batch.out_cache_loc = torch.cat([table[place, start:end] for place, start, end in spans]).to(torch.int64)
        batch.multimodal_inputs = [None] * len(unread)
        batch.return_logprob, batch.sampling_info = False, None
        batch.spec_info = EagleDraftExtendInput(
            hidden_states=self._states[rows], num_tokens_per_req=1, num_tokens_for_logprob_per_req=1
        )
        forward_batch = ForwardBatch.init_new(
            batch, runner, capture_hidden_mode=CaptureHiddenMode.LAST, return_hidden_states_before_norm=False
        )
        filling = nullcontext if drafting else getattr(runner.model, "filling_cache", nullcontext)
        with (
            filling(),
            draft_tp_context(self._worker.parallel_layout),
            speculative_moe_backend_context(),
            speculative_moe_a2a_backend_context(),
        ):
            return runner.forward(forward_batch).logits_output

"""The worker of ``FOURFOLD_MTP``: SGLang's EAGLE worker, whose drafts come from a request's text where it repeats.

A batch verifies as many tokens of each request as `LearnedLength` chooses, ``--speculative-num-steps`` where SGLang
cannot change that: its suffix draft where `HybridDrafts` has one, else those of the MTP head. The rest of a row repeats
the last token of the draft; verification treats every token as any other, so the output stays the target's, greedy and
sampled. A batch whose every request has a suffix draft runs no step of the head; the head still reads all verified
tokens, so that its KV cache is complete, those of steps without drafts later (`deferred_head`). Tensor-parallel ranks
see the same text and so draft the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.speculative import eagle_worker_v2
from sglang.srt.speculative.adaptive_runtime_state import AdaptiveController
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker, EAGLEWorkerV2

from fourfold.common.log import get_logger
from fourfold.common.settings import settings_from_env
from fourfold.sglang_ext.deferred_head import DeferredHead, capacity, obstacle
from fourfold.sglang_ext.mtp_length import LearnedLength, fixed_reason
from fourfold.sglang_ext.mtp_texts import TextDrafts


def _is_no_switch(record: logging.LogRecord) -> bool:
    """SGLang writes a line at each change of length, which here may come with every step."""
    return not record.getMessage().startswith("Switch adaptive runtime state")


class MtpDraftWorker(EagleDraftWorker):
    """Fills the rows of a batch from both sources."""

    head_tokens: int  # the head's longest draft; graphs of each length are captured with that or the length
    drafts: Mapping[int, list[int]] = {}  # of the texts, by row
    first: bool = False  # the head drafts no more than its first token, beside those
    skips: bool = False  # this step runs no head
    deferred: DeferredHead | None = None

    def draft(self, batch: Any, **kwargs: Any) -> Any:
        drafts = self.drafts
        # Data-parallel ranks take part in each other's collectives: none may leave the head out alone.
        alone = self.first or len(drafts) == len(batch.reqs)
        self.skips = bool(drafts) and alone and not is_dp_attention_enabled()
        graphs = self.cuda_graph_runner
        try:
            if self.skips:
                self.cuda_graph_runner = None
            verify_input = super().draft(batch, **kwargs)
        finally:
            self.skips, self.cuda_graph_runner = False, graphs
        if drafts:
            width = self.speculative_num_steps
            rows = [draft + draft[-1:] * (width - len(draft)) for draft in drafts.values()]
            tokens: torch.Tensor = verify_input.draft_token
            places = torch.tensor(list(drafts), device=tokens.device)
            tokens.view(-1, width + 1)[places, 1:] = torch.tensor(rows, dtype=tokens.dtype, device=tokens.device)
        return verify_input

    def draft_forward(self, forward_batch: Any) -> tuple[Any, ...]:
        """The head's chain in rows of the verified length; SGLang's only makes rows of the drafted one."""
        width = self.speculative_num_steps
        idle = forward_batch.forward_mode.is_idle()
        if self.skips and not idle:
            tokens = forward_batch.spec_info.topk_index
        else:
            tokens = self._chain(forward_batch, min(self.head_tokens, width), idle)
        if idle:
            return None, None, None, None
        # The tree of a chain, as SGLang describes it: parents of all but the last step, places of all.
        places = torch.arange(width, device=tokens.device).repeat(len(tokens), 1)
        parents = places - 1 if width > 1 else places[:, :0]
        return parents, places, torch.cat([tokens, tokens[:, -1:].expand(-1, width - tokens.shape[1])], 1), None

    def _draft_extend_for_decode(self, batch: Any, batch_result: Any, **kwargs: Any) -> None:
        if self.deferred is None or self.speculative_num_steps or batch.forward_mode.is_idle():
            super()._draft_extend_for_decode(batch, batch_result, **kwargs)
        else:
            self.deferred.defer(batch, batch_result)

    def _chain(self, forward_batch: Any, steps: int, idle: bool) -> Any:
        """[requests, steps] drafted by the head."""
        width = self.speculative_num_steps
        if not idle:
            forward_batch.out_cache_loc = forward_batch.out_cache_loc.view(-1, width)[:, :steps].flatten()
        self.speculative_num_steps, self.speculative_num_draft_tokens = steps, steps + 1
        try:
            tokens = super().draft_forward(forward_batch)[2]
        finally:
            self.speculative_num_steps, self.speculative_num_draft_tokens = width, width + 1
        if not idle:
            # SGLang's graphs take back as many positions as the verified length has.
            forward_batch.positions.add_(width - steps)
        return tokens


class MtpWorker(EAGLEWorkerV2):
    """Plans each step's drafts, hands its draft worker the texts', and reports what became of them."""

    def __init__(self, server_args: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(server_args, *args, **kwargs)
        settings = settings_from_env().mtp.hybrid
        self.texts = TextDrafts()
        self.longest = self.speculative_num_steps
        self.most = min(settings.head_tokens, self.longest) if settings.enabled else self.longest
        self.length: LearnedLength | None = None
        self.deferred: DeferredHead | None = None
        if self._draft_worker is None:
            return
        # The constructor of EAGLEWorkerV2 names the class of its draft worker.
        self._draft_worker.__class__ = MtpDraftWorker
        self._draft_worker.head_tokens = self.most  # type: ignore[attr-defined]
        reason = fixed_reason(server_args, self._draft_worker.draft_runner.model_config.hf_config)
        if not settings.learn_head:
            reason = "mtp.hybrid.learn_head is false"
        if reason is None:
            self.length = LearnedLength(self.longest, self.most)
            self.adaptive_controller = AdaptiveController(self, self.length)
            logging.getLogger(eagle_worker_v2.__name__).addFilter(_is_no_switch)
        head = f"{self.most} ({reason})" if reason else f"up to {self.most}"
        get_logger(__name__).info("fourfold: the MTP head drafts %s of at most %d tokens", head, self.longest)
        if reason is None:
            self._defer()

    def _defer(self) -> None:
        """Leave the head out of steps without drafts, where that can be."""
        worker: Any = self._draft_worker
        reason = obstacle(worker.draft_runner)
        if not reason:
            worker.deferred = self.deferred = DeferredHead(worker, capacity(), self._stub_skipped_draft_extend)
            self.length.defers = True  # type: ignore[union-attr]
        how = f"runs all the same: {reason}" if reason else "is left out, and reads later what it missed"
        get_logger(__name__).info("fourfold: in steps without drafts the MTP head %s", how)

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            if self.length is not None:
                self.length.prefill()
            if self.deferred is not None:
                self.deferred.forget(batch.reqs)
        else:
            self._plan(batch)
        return super().forward_batch_generation(batch, *args, **kwargs)

    def _plan(self, batch: Any) -> None:
        drafts, head = self.texts.propose(batch, self.longest), self.most
        if self.length is not None and batch.reqs:
            head, width = self.length.plan(len(batch.reqs), {row: len(draft) for row, draft in drafts.items()})
            if not width:
                self.texts.withdraw(batch, drafts)
            drafts = {row: draft[:width] for row, draft in drafts.items() if width}
            if self.deferred is not None and head:
                self.deferred.resume(batch)
        self.texts.begin(batch, drafts, head)
        self._draft_worker.drafts, self._draft_worker.first = drafts, head == 1  # type: ignore[attr-defined]

    def verify(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().verify(batch, *args, **kwargs)
        self.texts.verifying(result)
        return result

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        self.texts.verified(num_correct_drafts_per_req)
        super().on_verify_complete_cpu(num_correct_drafts_per_req, batch_size)

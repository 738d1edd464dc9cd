"""The worker of ``FOURFOLD_MTP``: SGLang's EAGLE worker, whose drafts come from a request's text where it repeats.

A batch verifies ``--speculative-num-steps`` drafted tokens of each request: its suffix draft where `HybridDrafts` has
one, else the ``head_tokens`` of the MTP head. The rest of a row repeats the last token of the draft; verification
treats every token as any other, so the output stays the target's, greedy and sampled. A batch whose every request has
a suffix draft runs no step of the head; the head still reads all verified tokens, so that its KV cache is complete.
Tensor-parallel ranks see the same text and so draft the same.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker, EAGLEWorkerV2

from fourfold.sglang_ext.mtp_texts import TextDrafts


class MtpDraftWorker(EagleDraftWorker):
    """Fills the rows of a batch from both sources."""

    texts: TextDrafts
    skips: bool = False  # this step runs no head

    def draft(self, batch: Any, **kwargs: Any) -> Any:
        drafts = self.texts.propose(batch, self.speculative_num_steps)
        # Data-parallel ranks take part in each other's collectives: none may leave the head out alone.
        self.skips = bool(drafts) and len(drafts) == len(batch.reqs) and not is_dp_attention_enabled()
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
            tokens = self._chain(forward_batch, self.texts.head_tokens(width), idle)
        if idle:
            return None, None, None, None
        # The tree of a chain, as SGLang describes it: parents of all but the last step, places of all.
        places = torch.arange(width, device=tokens.device).repeat(len(tokens), 1)
        parents = places - 1 if width > 1 else places[:, :0]
        return parents, places, torch.cat([tokens, tokens[:, -1:].expand(-1, width - tokens.shape[1])], 1), None

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
    """Hands its draft worker the verified text and reports what became of the drafts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.texts = TextDrafts()
        if self._draft_worker is not None:
            # The constructor of EAGLEWorkerV2 names the class of its draft worker.
            self._draft_worker.__class__ = MtpDraftWorker
            self._draft_worker.texts = self.texts  # type: ignore[attr-defined]

    def verify(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().verify(batch, *args, **kwargs)
        self.texts.verifying(result)
        return result

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        self.texts.verified(num_correct_drafts_per_req)
        super().on_verify_complete_cpu(num_correct_drafts_per_req, batch_size)

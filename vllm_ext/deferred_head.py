"""What steps in which the head drafts nothing skip, for `AdaptiveWorker` and `HybridWorker`: the head itself.

vLLM's V1 model runner runs the head in every step, over the verified tokens, also where it drafts none, since the KV
cache of the head needs them. `DeferredHead` stores their hidden states, as many as the head reads at once, and lets it
read them together when drafting resumes or one of the reasons of `fourfold.common.mtp.deferred` calls for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from fourfold.common.mtp.deferred import Batch, Deferred


def obstacle(runner: Any) -> str:
    """Why this runner's head must read in every step; empty where it need not."""
    config, drafter = runner.vllm_config, runner.drafter
    parallel = config.parallel_config
    reasons = {
        "data-parallel ranks run it together": parallel.data_parallel_size > 1,
        "asynchronous scheduling drafts before the host knows the text; --no-async-scheduling would": (
            runner.use_async_scheduling
        ),
        "the KV cache is transferred": config.kv_transfer_config is not None,
        "the KV cache is split over ranks": parallel.decode_context_parallel_size > 1,
        f"not with {type(drafter).__name__}": type(drafter) is not EagleProposer or drafter.method != "mtp",
        "not with images": drafter.supports_mm_inputs or drafter.uses_mrope,
        "not with --enable-prompt-embeds": config.model_config.enable_prompt_embeds,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def sample_without_drafts(runner: Any) -> None:
    """Let the runner sample as without speculation where nothing is verified: the rejection sampler copies logits."""
    sample = runner._sample

    def draftless(logits: Any, spec_decode_metadata: Any) -> Any:
        drafted = spec_decode_metadata is not None and spec_decode_metadata.max_spec_len > 0
        return sample(logits, spec_decode_metadata if drafted else None)

    runner._sample = draftless


def only_decodes(output: Any) -> bool:
    """Whether no request of a step reads its prompt: each verifies its draft and adds a token."""
    tokens = output.scheduled_spec_decode_tokens
    return not output.scheduled_new_reqs and all(
        count == len(tokens.get(request, ())) + 1 for request, count in output.num_scheduled_tokens.items()
    )


def defer(runner: Any) -> tuple[DeferredHead | None, str]:
    """Let ``runner`` skip what it can, and say of the head what the log should."""
    sample_without_drafts(runner)
    reason = obstacle(runner)
    if reason:
        return None, f"runs all the same: {reason}"
    return DeferredHead(runner), "is left out, and reads later what it missed"


class DeferredHead:
    """Takes the place of a V1 runner's drafting in steps whose drafts, if any, are not the head's."""

    def __init__(self, runner: Any) -> None:
        self._runner, self._drafter = runner, runner.drafter
        self._states = torch.empty_like(self._drafter.hidden_states)
        self._deferred: Deferred | None = None  # the block size is known once the KV cache is
        self._propose = runner.propose_draft_token_ids
        runner.propose_draft_token_ids = self.propose

    def begin(self, output: Any) -> None:
        """See what a step changes, before it does."""
        deferred, group = self._deferred, self._drafter.kv_cache_gid
        if deferred is None or not deferred.count:
            return
        new, cached = output.scheduled_new_reqs, output.scheduled_cached_reqs
        gone = chain(output.finished_req_ids, cached.resumed_req_ids, (request.req_id for request in new))
        deferred.leave(gone, self._text)
        read: list[int] = []  # cached blocks that get another reader; the others that are given out get another owner
        owned: list[int] = []
        for request in new:
            cut = request.num_computed_tokens // deferred.block_size
            read += request.block_ids[group][:cut]
            owned += request.block_ids[group][cut:]
        for request, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if ids is not None:
                (read if request in cached.resumed_req_ids else owned).extend(ids[group])
        deferred.forget(owned)
        if output.kv_cache_block_copies or deferred.touches(chain(read, owned)):
            self.catch_up()

    def propose(self, output: Any, *args: Any, accepted: Sequence[int] | None = None, **kwargs: Any) -> Any:
        """In place of the runner's: no drafts, where none are asked for and it is known what was verified.

        Args:
            accepted: drafted tokens that were right, by row of the batch; None if not known, where any were verified.
        """
        verified = output.scheduled_spec_decode_tokens
        if output.num_spec_tokens_to_schedule or (verified and accepted is None):
            self.catch_up()
            return self._propose(output, *args, **kwargs)
        runner, hidden_states = self._runner, args[2]
        batch = runner.input_batch
        blocks = batch.block_table[self._drafter.kv_cache_gid]
        deferred = self._deferred = self._deferred or Deferred(len(self._states), blocks.block_size)
        requests = list(batch.req_ids)
        starts = batch.num_computed_tokens_cpu[: len(requests)]
        counts = runner.num_scheduled_tokens.np[: len(requests)]
        rows: Any = slice(output.total_num_scheduled_tokens)
        if verified and accepted is not None:
            ends = np.cumsum(counts)
            wrong = [len(verified.get(r, ())) - good for r, good in zip(requests, accepted, strict=True)]
            firsts, counts = ends - counts, counts - wrong
            rows = torch.from_numpy(np.concatenate(list(map(np.arange, firsts, firsts + counts))))
            rows = rows.to(self._states.device)
        count = int(counts.sum())
        if not deferred.room(count):
            self.catch_up()
        alternative = getattr(runner.get_model(), "get_mtp_target_hidden_states", lambda: None)()
        first = deferred.add(requests, starts, counts, blocks.block_table.np[: len(requests)])
        states = hidden_states if alternative is None else alternative
        self._states[first : first + count] = states[rows]
        runner._draft_probs = runner._draft_prob_req_ids = None
        return torch.empty(len(requests), 0, dtype=torch.int64, device=self._states.device)

    @torch.inference_mode()
    def catch_up(self) -> None:
        """Let the head read all that it has not."""
        if self._deferred is None or not self._deferred.count:
            return
        with gpu_sync_allowed():
            for batch in self._deferred.take(self._text, self._drafter.max_batch_size):
                self._read(batch)

    def _text(self, request: str, first: int, end: int) -> tuple[Sequence[int], Sequence[int]]:
        state = self._runner.requests[request]
        blocks = state.block_ids[self._drafter.kv_cache_gid]
        return list(blocks), [state.get_token_id(i) for i in range(first, end)]

    def _read(self, batch: Batch) -> None:
        device = self._states.device
        rows, tokens, positions, slots, starts, lengths, blocks = (
            torch.from_numpy(array).to(device)
            for array in (
                *(batch.rows, batch.tokens, batch.positions, batch.slots),
                *(batch.starts, batch.lengths, batch.blocks),
            )
        )
        metadata = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=torch.from_numpy(batch.starts),
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=torch.from_numpy(batch.lengths),
            num_reqs=len(lengths),
            num_actual_tokens=len(rows),
            max_query_len=int((batch.starts[1:] - batch.starts[:-1]).max()),
            max_seq_len=int(batch.lengths.max()),
            block_table_tensor=blocks,
            slot_mapping=slots,
        )
        # vLLM reads at each position the token of the one after it, and ``next_token_ids`` at a request's last.
        with getattr(self._drafter.model, "filling_cache", nullcontext)():
            self._drafter.propose(
                num_speculative_tokens=0,
                target_token_ids=tokens.roll(1),
                target_positions=positions,
                target_hidden_states=self._states[rows],
                next_token_ids=tokens[starts[1:].long() - 1],
                token_indices_to_sample=None,
                common_attn_metadata=metadata,
                sampling_metadata=self._runner.input_batch.sampling_metadata,
            )

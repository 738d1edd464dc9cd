"""Greedy verification on CPUs from one pass over the logits.

vLLM's rejection sampler copies the logits several times, also where each request takes its likeliest token and nothing
changes a logit. There the choices alone are needed.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.rejection_sampler import RejectionSampler

from fourfold.common.mtp.verify import verify_greedy_packed


def plain(sampler: Any, sampling_metadata: Any) -> bool:
    """Whether verification is a comparison with the likeliest tokens of the logits as they are."""
    holder = sampling_metadata.thinking_budget_state_holder
    return (
        sampling_metadata.all_greedy
        and not sampler.synthetic_mode
        and sampling_metadata.max_num_logprobs is None
        and not sampling_metadata.logprob_token_ids
        and sampling_metadata.no_penalties
        and sampling_metadata.allowed_token_ids_mask is None
        and not sampling_metadata.bad_words_token_ids
        and (holder is None or not holder.has_tracked_requests())
        and all(map(_idle, sampling_metadata.logitsprocs.non_argmax_invariant))
    )


def _idle(processor: Any) -> bool:
    if type(processor) is LogitBiasLogitsProcessor:
        return not processor.biases
    return type(processor) is MinTokensLogitsProcessor and not processor.min_toks


def shorten() -> None:
    """Put it before vLLM's rejection sampler, which does all else."""
    stock = RejectionSampler.forward
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def forward(self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        if not plain(self, sampling_metadata):
            return stock(self, metadata, draft_probs, logits, sampling_metadata)
        choices = self.sampler.greedy_sample(logits.to(torch.float32))
        verified = verify_greedy_packed(choices, metadata.draft_token_ids, metadata.num_draft_tokens)
        return SamplerOutput(sampled_token_ids=verified.tokens.int(), logprobs_tensors=None)

    RejectionSampler.forward = forward  # type: ignore[method-assign]

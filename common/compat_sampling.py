"""Rows of `fourfold.common.compat` for sampling with speculation on a CPU."""

from __future__ import annotations

from functools import partial

from fourfold.common.seam import Seam, vllm

_SAMPLING = "v1.sample.metadata:SamplingMetadata"
_DRAFTS = "v1.spec_decode.metadata:SpecDecodeMetadata"
_greedy = partial(vllm, until="vLLM's rejection sampler on a CPU copies no logits where all requests are greedy")

SAMPLING: tuple[Seam, ...] = (
    vllm(
        "utils.cpu_triton_utils:_expand_kernel_impl",
        "replaced on a CPU, for it drops what it computes",
        ("cu_num_tokens", "replace_from", "replace_to"),
        "vLLM mends its issue 55005",
    ),
    vllm(
        "v1.sample.ops.topk_topp_sampler:apply_top_k_only",
        "wrapped on a CPU, for it fails on no rows",
        ("logits", "k"),
        "vLLM's top-k takes no rows",
    ),
    vllm("platforms:current_platform", "whether to repair sampling on a CPU"),
    _greedy(
        "v1.sample.rejection_sampler:RejectionSampler.forward",
        "wrapped on a CPU: greedy verification without copies of logits",
        ("metadata", "draft_probs", "logits", "sampling_metadata"),
    ),
    _greedy("v1.sample.rejection_sampler:RejectionSampler.synthetic_mode", "leaves that mode to vLLM"),
    _greedy("v1.sample.rejection_sampler:RejectionSampler.sampler", "finds the likeliest tokens"),
    _greedy("v1.sample.sampler:Sampler.greedy_sample", "finds the likeliest tokens", ("logits",)),
    _greedy("v1.outputs:SamplerOutput", "the tokens"),
    _greedy(f"{_DRAFTS}.draft_token_ids", "what is verified"),
    _greedy(f"{_DRAFTS}.num_draft_tokens", "what is verified"),
    *(
        _greedy(f"{_SAMPLING}.{name}", "whether something changes a logit, or asks for it")
        for name in (
            *("all_greedy", "max_num_logprobs", "logprob_token_ids", "no_penalties", "allowed_token_ids_mask"),
            *("bad_words_token_ids", "thinking_budget_state_holder", "logitsprocs"),
        )
    ),
    _greedy("v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor.biases", "whether it changes a logit"),
    _greedy("v1.sample.logits_processor.builtin:MinTokensLogitsProcessor.min_toks", "whether it changes a logit"),
    _greedy("v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.has_tracked_requests", "the same"),
)

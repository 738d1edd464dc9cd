"""Rows of `fourfold.common.compat` for steps without drafts, which leave the head out."""

from __future__ import annotations

from functools import partial

from fourfold.common.seam import Seam, vllm

_SKIPPED = "vLLM leaves the head and the rejection sampler out of steps that draft nothing"
_RUNNER = "v1.worker.gpu_model_runner:GPUModelRunner"
_DRAFTER = "v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_BATCH = "v1.worker.gpu_input_batch:InputBatch"
_OUTPUT = "v1.core.sched.output:SchedulerOutput"
PROPOSED = (
    *("num_speculative_tokens", "target_token_ids", "target_positions", "target_hidden_states", "next_token_ids"),
    *("token_indices_to_sample", "common_attn_metadata", "sampling_metadata"),
)
_vllm = partial(vllm, until=_SKIPPED)

DEFERRED: tuple[Seam, ...] = (
    _vllm("v1.worker.gpu_worker:Worker.use_v2_model_runner", "whether the runner is the one to change"),
    _vllm(f"{_RUNNER}._sample", "wrapped: samples without the rejection sampler", ("logits", "spec_decode_metadata")),
    _vllm("v1.spec_decode.metadata:SpecDecodeMetadata.max_spec_len", "whether a step verifies drafts"),
    _vllm(
        f"{_RUNNER}.propose_draft_token_ids",
        "replaced: stores hidden states in place of the head's reading them",
        ("scheduler_output", "hidden_states"),
    ),
    _vllm(f"{_RUNNER}.num_scheduled_tokens", "positions of a step"),
    _vllm(f"{_RUNNER}.use_async_scheduling", "whether the host knows the text"),
    _vllm(f"{_RUNNER}.get_model", "hidden states that the target keeps for its head"),
    _vllm(f"{_RUNNER}._draft_probs", "none of a step without drafts"),
    _vllm(f"{_RUNNER}._draft_prob_req_ids", "none of a step without drafts"),
    _vllm("v1.spec_decode.eagle:EagleProposer", "the drafter that can read late"),
    _vllm(f"{_DRAFTER}.propose", "lets the head read", PROPOSED),
    _vllm(f"{_DRAFTER}.hidden_states", "how many positions it reads at once"),
    _vllm(f"{_DRAFTER}.max_batch_size", "how many requests it reads at once"),
    _vllm(f"{_DRAFTER}.kv_cache_gid", "which blocks are the head's"),
    _vllm(f"{_DRAFTER}.method", "whether it is an MTP head"),
    _vllm(f"{_DRAFTER}.supports_mm_inputs", "refuses images"),
    _vllm(f"{_DRAFTER}.uses_mrope", "refuses images"),
    _vllm(f"{_BATCH}.block_table", "blocks of the requests"),
    _vllm(f"{_BATCH}.num_computed_tokens_cpu", "positions of a step"),
    _vllm("v1.worker.block_table:BlockTable.block_size", "positions of a block"),
    _vllm("v1.worker.block_table:BlockTable.block_table", "blocks of the requests"),
    _vllm("v1.worker.gpu_input_batch:CachedRequestState.block_ids", "blocks of a request that ends"),
    _vllm("v1.worker.gpu_input_batch:CachedRequestState.get_token_id", "its text", ("idx",)),
    _vllm(f"{_OUTPUT}.total_num_scheduled_tokens", "positions of a step"),
    _vllm(f"{_OUTPUT}.scheduled_new_reqs", "blocks that get another reader or owner"),
    _vllm(f"{_OUTPUT}.scheduled_cached_reqs", "blocks that get another owner"),
    _vllm(f"{_OUTPUT}.kv_cache_block_copies", "blocks that are copied"),
    _vllm("v1.core.sched.output:NewRequestData.block_ids", "blocks that get another reader or owner"),
    _vllm("v1.core.sched.output:NewRequestData.num_computed_tokens", "which of the two"),
    _vllm("v1.core.sched.output:CachedRequestData.new_block_ids", "blocks that get another owner"),
    _vllm("v1.core.sched.output:CachedRequestData.req_ids", "whose they are"),
    _vllm("v1.core.sched.output:CachedRequestData.resumed_req_ids", "requests that get other blocks"),
    _vllm("v1.attention.backend:CommonAttentionMetadata", "what the head reads"),
    _vllm("config.vllm:VllmConfig.kv_transfer_config", "refuses a cache that another engine reads"),
    _vllm("config.parallel:ParallelConfig.decode_context_parallel_size", "refuses a cache that is split"),
    _vllm("config.model:ModelConfig.enable_prompt_embeds", "refuses prompts without tokens"),
)

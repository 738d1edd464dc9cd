"""Rows of `fourfold.common.compat` for steps without drafts, which leave the head out."""

from __future__ import annotations

from functools import partial

from fourfold.common.seam import Seam, sglang, vllm

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

_LATE = "SGLang reads late what steps without drafts leave out"
_SCHEDULED = "managers.schedule_batch:ScheduleBatch"
_CACHE = "mem_cache.base_prefix_cache:BasePrefixCache"
_EVERY = "where it is on, the head reads in every step"
_READ = "what the head reads late"
_sglang = partial(sglang, until=_LATE)

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
    _sglang(
        "speculative.eagle_worker_v2:EagleDraftWorker._draft_extend_for_decode",
        "keeps what was verified instead of the head",
        ("batch", "batch_result", "kv_loc_plan"),
    ),
    _sglang(
        "speculative.eagle_worker_v2:EAGLEWorkerV2._stub_skipped_draft_extend",
        "what is passed on of a head that did not run",
        ("batch", "batch_output"),
    ),
    _sglang(f"{_CACHE}.checkpoint", "wrapped: the head reads before a prefix is shared", ("req",)),
    _sglang(f"{_CACHE}.supports_prefix_sharing", "whether one may be"),
    *(
        _sglang(f"speculative.eagle_info:EagleDraftExtendInput.{name}", _READ)
        for name in ("hidden_states", "num_tokens_per_req", "num_tokens_for_logprob_per_req")
    ),
    _sglang("speculative.eagle_info:EagleDraftInput.topk_p", "the first draft after it"),
    _sglang("speculative.eagle_info:EagleDraftInput.hidden_states", "the first draft after it"),
    _sglang(
        "model_executor.forward_batch_info:ForwardBatch.init_new",
        _READ,
        ("batch", "model_runner", "capture_hidden_mode", "return_hidden_states_before_norm"),
    ),
    _sglang("model_executor.forward_batch_info:CaptureHiddenMode.LAST", _READ),
    _sglang("model_executor.forward_batch_info:ForwardMode.EXTEND", _READ),
    _sglang("model_executor.model_runner:ModelRunner.forward", "reads it", ("forward_batch",)),
    *(
        _sglang(f"{_SCHEDULED}.{name}", _READ)
        for name in (
            *("prefix_lens", "extend_lens", "extend_num_tokens", "extend_logprob_start_lens", "forward_mode"),
            *("input_ids", "seq_lens_cpu", "seq_lens_sum", "orig_seq_lens", "req_pool_indices", "out_cache_loc"),
            *("multimodal_inputs", "return_logprob", "sampling_info", "spec_info", "req_to_token_pool", "tree_cache"),
        )
    ),
    _sglang("managers.schedule_batch:ReqKvInfo.req_pool_idx", "where its cache entries go"),
    _sglang("mem_cache.memory_pool:ReqToTokenPool.req_to_token", "where its cache entries go"),
    _sglang("speculative.spec_utils:draft_tp_context", "runs the head", ("layout",)),
    _sglang("layers.moe.utils:speculative_moe_backend_context", "runs the head"),
    _sglang("layers.moe.utils:speculative_moe_a2a_backend_context", "runs the head"),
    _sglang("runtime_context:get_schedule", "how much is kept"),
    _sglang("arg_groups.fields.schedule:Schedule.chunked_prefill_size", "how much is kept"),
    _sglang("arg_groups.fields.schedule:Schedule.max_running_requests", "how much is kept"),
    _sglang("arg_groups.fields.schedule:Schedule.disable_overlap_schedule", _EVERY),
    _sglang("runtime_context:get_disagg", _EVERY),
    _sglang("arg_groups.fields.disagg:Disagg.disaggregation_mode", _EVERY),
    _sglang("arg_groups.fields.parallel:Parallel.pp_size", _EVERY),
    _sglang("arg_groups.fields.parallel:Parallel.dcp_enabled", _EVERY),
    _sglang("arg_groups.fields.spec:Spec.speculative_use_rejection_sampling", _EVERY),
    _sglang("model_executor.model_runner:ModelRunner.is_hybrid_swa", _EVERY),
    _sglang("configs.model_config:ModelConfig.model_is_mrope", _EVERY),
)

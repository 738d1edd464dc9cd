"""Every attribute of an engine that fourfold touches, and the check of it.

The check reads the engine's source and imports nothing, so it also runs on the unpacked wheel of a version that is not
installed. `fourfold doctor` prints it for the installed engine; CI runs it against all versions in scope.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fourfold.common.compat_deferred import DEFERRED
from fourfold.common.compat_length import LENGTH
from fourfold.common.compat_mla import MLA
from fourfold.common.compat_modules import MODULES
from fourfold.common.compat_parallel import PARALLEL
from fourfold.common.compat_processes import PROCESSES
from fourfold.common.compat_recipes import RECIPES
from fourfold.common.compat_sampling import SAMPLING
from fourfold.common.definitions import missing
from fourfold.common.seam import Seam, sglang, vllm

_Q = "model_executor.layers.quantization"
_CREATE = (
    *("layer", "input_size_per_partition", "output_partition_sizes", "input_size", "output_size"),
    *("params_dtype", "extra_weight_attrs"),
)
_ATTENTION = ("q", "k", "v", "layer", "forward_batch")
_CACHE = ("query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens")
_BATCHES = "SGLang's PyTorch attention takes a batch at once"
_EAGLE_CPU = "SGLang speculates on out-of-tree platforms without Triton"
_ALGORITHM = "SGLang's class for registered algorithms has it"
_RUNNER = "v1.worker.gpu_model_runner:GPUModelRunner"
_DRAFT_WORKER = "SGLang lets a registered algorithm choose its draft worker"
_SCHEDULER = "vLLM lets a plugin choose the draft length"
_RANKS = "vLLM's dynamic speculation works under data parallelism"
_DRAFTER = "vLLM lets a plugin draft beside an MTP head"
_LOADER = "the engine offers quantisation methods a loader without naming their class"


SEAMS: tuple[Seam, ...] = (
    vllm(f"{_Q}:register_quantization_config", "registers --quantization fourfold_nvfp4", ("quantization",)),
    vllm(f"{_Q}.base_config:QuantizationConfig.get_quant_method", "gives layers their method", ("layer", "prefix")),
    vllm(
        f"{_Q}.base_config:QuantizationConfig.override_quantization_method",
        "lets the flag serve checkpoints of other methods",
        ("hf_quant_cfg", "user_quant", "hf_config"),
    ),
    vllm(f"{_Q}.base_config:QuantizationConfig.apply_vllm_mapper", "renames ignored layers", ("hf_to_vllm_mapper",)),
    vllm(f"{_Q}.base_config:QuantizeMethodBase.process_weights_after_loading", "finishes dummy weights", ("layer",)),
    vllm("model_executor.layers.linear:LinearMethodBase.create_weights", "creates parameters", _CREATE),
    vllm("model_executor.layers.linear:LinearMethodBase.apply", "multiplies", ("layer", "x", "bias")),
    vllm("model_executor.layers.linear:LinearBase", "recognises linear layers; tp_rank and tp_size of a layer"),
    vllm("model_executor.layers.linear:UnquantizedLinearMethod", "keeps a layer in its dtype"),
    vllm(
        "model_executor.layers.linear:register_weight_loader_v2_supported_method",
        "asks for the loader that knows parameter classes",
        ("cls",),
        _LOADER,
    ),
    vllm("model_executor.parameter:ModelWeightParameter", "weights"),
    vllm("model_executor.parameter:GroupQuantScaleParameter", "block scales"),
    vllm("model_executor.parameter:BlockQuantScaleParameter", "FP8 block scales"),
    vllm("model_executor.parameter:PerTensorScaleParameter", "global scales, one a shard"),
    vllm("distributed.parallel_state:get_tp_group", "largest magnitude over the ranks"),
    vllm("distributed.parallel_state:GroupCoordinator.device_group", "largest magnitude over the ranks"),
    vllm("config:get_current_vllm_config", "model path and --additional-config"),
    vllm("config.vllm:VllmConfig.additional_config", "fourfold's settings"),
    vllm("config.model:ModelConfig.model", "where statistics may lie"),
    vllm("config:VllmConfig", "what a draft is built from"),
    vllm("config:set_current_vllm_config", "builds a draft under its own config"),
    vllm("config.vllm:VllmConfig.use_v2_model_runner", "how many MTP modules draft"),
    vllm("config.vllm:VllmConfig.num_speculative_tokens", "how many MTP modules draft"),
    vllm("compilation.decorators:support_torch_compile", "compiles a draft", ("dynamic_arg_dims", "enable_if")),
    vllm("distributed.parallel_state:get_tensor_model_parallel_world_size", "the ranks of a draft vocabulary"),
    vllm("distributed.communication_op:tensor_model_parallel_all_gather", "gathers a sequence-parallel layer's output"),
    vllm("model_executor.layers.layernorm:RMSNorm", "norms of a draft"),
    vllm("model_executor.layers.layernorm:GemmaRMSNorm", "norms of a draft"),
    vllm("model_executor.layers.linear:QKVParallelLinear", "loads fused layers of a draft"),
    vllm("model_executor.layers.linear:ReplicatedLinear", "projections of a draft"),
    vllm("model_executor.layers.logits_processor:LogitsProcessor", "logits of a draft"),
    vllm(
        "model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        "the product with a draft vocabulary on a CPU",
        ("layer", "remove_weight"),
    ),
    vllm("model_executor.layers.vocab_parallel_embedding:ParallelLMHead", "a draft's own output head"),
    vllm("model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding", "a draft's own embedding"),
    vllm("model_executor.model_loader:get_model_cls", "finds the target's decoder layer"),
    vllm("model_executor.models.utils:AutoWeightsLoader.load_weights", "loads a draft", ("weights", "mapper")),
    vllm("model_executor.models.utils:WeightsMapper.orig_to_new_stacked", "loads fused layers of a draft"),
    vllm("model_executor.models.utils:get_draft_quant_config", "a draft's own quantisation", ("vllm_config",)),
    vllm("model_executor.models.utils:maybe_prefix", "names of a draft's layers"),
    vllm("model_executor.models:ModelRegistry", "registers the draft class"),
    vllm("v1.core.sched.async_scheduler:AsyncScheduler", "learns the draft length", until=_SCHEDULER),
    vllm("v1.core.sched.scheduler:Scheduler.dynamic_sd_lookup", "answers with it", until=_SCHEDULER),
    vllm("v1.core.sched.scheduler:Scheduler.schedule", "times a step", until=_SCHEDULER),
    vllm(
        "v1.core.sched.scheduler:Scheduler.make_spec_decoding_stats",
        "sees what was accepted",
        ("num_draft_tokens", "num_accepted_tokens", "num_invalid_spec_tokens", "request_id"),
        _SCHEDULER,
    ),
    vllm(
        "v1.core.sched.scheduler:Scheduler.update_from_output",
        "times a step",
        ("scheduler_output", "model_runner_output"),
        _SCHEDULER,
    ),
    vllm("v1.core.sched.output:SchedulerOutput", "a step", until=_SCHEDULER),
    vllm("v1.core.sched.output:SchedulerOutput.num_spec_tokens_to_schedule", "the length in use", until=_SCHEDULER),
    vllm("v1.core.sched.output:SchedulerOutput.scheduled_spec_decode_tokens", "which steps to time", until=_SCHEDULER),
    vllm("v1.core.sched.scheduler:Scheduler.vllm_config", "whether data-parallel ranks learn", until=_SCHEDULER),
    vllm("config.parallel:ParallelConfig.data_parallel_size", "whether ranks must agree", until=_RANKS),
    vllm("config.parallel:ParallelConfig.worker_cls", "whether empty steps are told the length", until=_RANKS),
    vllm("config.parallel:ParallelConfig.enable_elastic_ep", "whether ranks may join", until=_RANKS),
    vllm("config.compilation:CUDAGraphMode.has_full_cudagraphs", "whether verification is fixed", until=_RANKS),
    vllm(
        "v1.engine.core:DPEngineCoreProc._has_global_unfinished_reqs",
        "wrapped under data parallelism, where ranks agree on the draft length",
        ("local_unfinished",),
        _RANKS,
    ),
    vllm("v1.engine.core:DPEngineCoreProc.step_counter", "when they do", until=_RANKS),
    vllm("v1.engine.core:DPEngineCoreProc.dp_sync_interval", "when they do", until=_RANKS),
    vllm("v1.engine.core:DPEngineCoreProc.dp_group", "exchanges what they saw", until=_RANKS),
    vllm("v1.engine.core:DPEngineCoreProc.dp_rank", "exchanges what they saw", until=_RANKS),
    vllm("v1.engine.core:DPEngineCoreProc.dp_size", "exchanges what they saw", until=_RANKS),
    vllm("v1.engine.core:EngineCore.execute_dummy_batch", "replaced to tell workers the length", until=_RANKS),
    vllm("v1.engine.core:EngineCore.model_executor", "tells workers the length", until=_RANKS),
    vllm("v1.executor.abstract:Executor.collective_rpc", "the same", ("method", "timeout", "args"), _RANKS),
    vllm("envs:VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "as long as vLLM waits", until=_RANKS),
    vllm("v1.worker.gpu_worker:Worker.execute_dummy_batch", "takes the length", until=_RANKS),
    vllm("v1.worker.gpu_worker:Worker.execute_model", "takes the length", ("scheduler_output",), _RANKS),
    vllm("v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.dummy_run", "runs the draft empty", until=_RANKS),
    vllm("v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.num_speculative_tokens", "how often", until=_RANKS),
    vllm("v1.worker.gpu_worker:Worker", "the worker that drafts from two sources, on a GPU", until=_DRAFTER),
    vllm("v1.worker.gpu_worker:Worker.init_device", "makes the runner", until=_DRAFTER),
    vllm("v1.worker.gpu_worker:Worker.model_runner", "drafts", until=_DRAFTER),
    vllm("v1.worker.worker_base:WorkerBase.is_driver_worker", "counts for its ranks", until=_DRAFTER),
    vllm("v1.worker.cpu_worker:CPUWorker", "the worker that drafts from two sources, on a CPU", until=_DRAFTER),
    vllm("v1.worker.cpu_worker:CPUWorker.init_device", "makes the runner", until=_DRAFTER),
    vllm(
        f"{_RUNNER}._update_states_after_model_execute",
        "replaced: sees the tokens of a step",
        ("output_token_ids", "scheduler_output"),
        _DRAFTER,
    ),
    vllm(f"{_RUNNER}.propose_draft_token_ids", "replaced: drafts", ("scheduler_output",), _DRAFTER),
    vllm(f"{_RUNNER}.drafter", "whether this pipeline stage drafts", until=_DRAFTER),
    vllm(f"{_RUNNER}.num_spec_tokens", "longest draft", until=_DRAFTER),
    vllm(f"{_RUNNER}.requests", "which texts to keep", until=_DRAFTER),
    vllm(f"{_RUNNER}.discard_request_mask", "which prompts are read in part", until=_DRAFTER),
    vllm(f"{_RUNNER}.input_batch", "the text of the requests", until=_DRAFTER),
    vllm("v1.worker.gpu_input_batch:InputBatch.req_ids", "the requests of a step", until=_DRAFTER),
    vllm("v1.worker.gpu_input_batch:InputBatch.num_reqs", "the requests of a step", until=_DRAFTER),
    vllm("v1.worker.gpu_input_batch:InputBatch.vocab_size", "which tokens are valid", until=_DRAFTER),
    vllm("v1.worker.gpu_input_batch:InputBatch.token_ids_cpu", "their text", until=_DRAFTER),
    vllm("v1.worker.gpu_input_batch:InputBatch.num_tokens_no_spec", "how long it is", until=_DRAFTER),
    vllm(
        "v1.sample.rejection_sampler:RejectionSampler.parse_output",
        "the accepted tokens",
        ("output_token_ids", "vocab_size", "discard_req_indices"),
        _DRAFTER,
    ),
    vllm("v1.core.sched.output:SchedulerOutput.finished_req_ids", "which texts to forget", until=_DRAFTER),
    vllm("v1.core.sched.output:SchedulerOutput.scheduled_spec_decode_tokens", "what was drafted", until=_DRAFTER),
    vllm("v1.core.sched.output:SchedulerOutput.num_scheduled_tokens", "which steps only decode", until=_DRAFTER),
    vllm(
        "distributed.parallel_state:GroupCoordinator.cpu_group", "one duration of a step for all ranks", until=_DRAFTER
    ),
    vllm("distributed.parallel_state:GroupCoordinator.world_size", "whether there are others", until=_DRAFTER),
    vllm("utils.gpu_sync_debug:gpu_sync_allowed", "drafts on the host", until=_DRAFTER),
    vllm("config.speculative:SpeculativeConfig.draft_sample_method", "refuses what is not certain", until=_DRAFTER),
    vllm("config.vllm:VllmConfig.use_v2_model_runner", "refuses the runner that drafts elsewhere", until=_DRAFTER),
    vllm("config.scheduler:SchedulerConfig.async_scheduling", "refuses late text", until=_DRAFTER),
    vllm("config.scheduler:SchedulerConfig.scheduler_cls", "refuses a learned draft length", until=_DRAFTER),
    vllm("platforms.interface:Platform.is_cuda_alike", "refuses platforms with workers of their own", until=_DRAFTER),
    sglang("arg_groups.choices:QUANTIZATION_CHOICES", "whether the choice is there already"),
    sglang("arg_groups.choices:add_quantization_method_choices", "adds the choice fourfold_nvfp4"),
    sglang(
        "layers.quantization:QUANTIZATION_METHODS",
        "registers the method, first",
        until="SGLang has a register function for quantisation methods",
    ),
    sglang(
        "layers.quantization:CPU_QUANTIZATION_METHODS",
        "registers the method for processors with AMX",
        until="SGLang has a register function for quantisation methods",
    ),
    sglang(
        "layers.quantization.base_config:QuantizationConfig.get_quant_method",
        "gives layers their method",
        ("layer", "prefix"),
    ),
    sglang(
        "layers.quantization.base_config:QuantizationConfig.override_quantization_method",
        "lets the flag serve checkpoints of other methods",
        ("hf_quant_cfg", "user_quant"),
    ),
    sglang(
        "layers.quantization.base_config:QuantizationConfig.apply_weight_name_mapper",
        "renames ignored layers",
        ("hf_to_sglang_mapper",),
    ),
    sglang(
        "layers.quantization.base_config:QuantizationConfig.is_linear_unquantized",
        "answers without creating a layer",
        ("prefix",),
    ),
    sglang("layers.quantization.base_config:LinearMethodBase.create_weights", "creates parameters", _CREATE),
    sglang("layers.quantization.base_config:LinearMethodBase.apply", "multiplies", ("layer", "x", "bias")),
    sglang("layers.quantization.unquant:UnquantizedLinearMethod", "keeps a layer in its dtype"),
    sglang("layers.linear:LinearBase.tp_group", "recognises linear layers; their rank"),
    sglang(
        "layers.linear:WEIGHT_LOADER_V2_SUPPORTED", "asks for the loader that knows parameter classes", until=_LOADER
    ),
    sglang("layers.parameter:ModelWeightParameter", "weights"),
    sglang("layers.parameter:GroupQuantScaleParameter", "block scales"),
    sglang("layers.parameter:BlockQuantScaleParameter", "FP8 block scales"),
    sglang("layers.parameter:PerTensorScaleParameter", "global scales, one a shard"),
    sglang("distributed.utils:get_group_rank_size", "rank of a layer", ("group",)),
    sglang("runtime_context:get_server_args", "where statistics may lie"),
    sglang("platforms.cpu:CpuDeviceMixin", "the CPU reference platform"),
    sglang("platforms.interface:SRTPlatform.apply_server_args_defaults", "its defaults", ("server_args",)),
    sglang("platforms.interface:SRTPlatform.get_default_attention_backend", "its attention"),
    sglang("platforms.interface:PlatformCapabilities", "says that it has no Triton and no graphs"),
    sglang("platforms.device_mixin:PlatformEnum.OOT", "marks it as out of tree"),
    sglang("platforms.interface:SRTPlatform.supports_speculative_algorithm", "EAGLE on a CPU", ("algorithm",)),
    sglang(
        "platforms.interface:SRTPlatform.get_speculative_worker_cls",
        "EAGLE on a CPU: asked for, replaces what its worker launches",
        ("algorithm",),
    ),
    sglang("platforms.interface:SRTPlatform.get_speculative_cache_locs_fn", "EAGLE on a CPU"),
    sglang(
        "platforms.interface:SRTPlatform.get_kv_pool_cls", "a cache that does not warm a Triton kernel up", ("kind",)
    ),
    sglang("mem_cache.memory_pool:MHATokenToKVPool._init_kv_copy_and_warmup", "that kernel's start", until=_EAGLE_CPU),
    sglang("layers.attention.attention_registry:register_attention_backend", "attention that verifies", ("name",)),
    *(
        sglang(f"layers.attention.torch_native_backend:TorchNativeAttnBackend.{name}", why, parameters, _BATCHES)
        for name, why, parameters in (
            ("_run_sdpa_forward_extend", "a batch at once", (*_CACHE, "extend_prefix_lens", "extend_seq_lens")),
            ("_run_sdpa_forward_decode", "a batch at once", _CACHE),
            ("use_sliding_window_kv_pool", "not then", ()),
            ("init_forward_metadata", "a step begins", ("forward_batch",)),
        )
    ),
    sglang("layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_extend", "the same", _ATTENTION),
    sglang("layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_decode", "the same", _ATTENTION),
    sglang("model_executor.forward_batch_info:ForwardBatch.extend_prefix_lens", "verifies as an extension"),
    sglang("model_executor.forward_batch_info:ForwardBatch.extend_seq_lens", "verifies as an extension"),
    sglang("speculative.eagle_info:EagleVerifyInput.draft_token_num", "verifies as an extension"),
    sglang("speculative.eagle_worker_v2:EAGLEWorkerV2.__init__", "drafts from the text too"),
    sglang("plugins.hook_registry:HookRegistry.register", "replaces functions", ("target", "hook", "hook_type")),
    sglang("plugins.hook_registry:HookRegistry.apply_hooks", "replaces functions"),
    *(
        Seam("sglang", path, "replaced on a CPU, for it launches a kernel", parameters, _EAGLE_CPU)
        for path, parameters in (
            (
                "sglang.kernels.ops.speculative.cache_locs:assign_draft_cache_locs_contiguous_func",
                ("req_pool_indices", "req_to_token", "seq_lens", "out_cache_loc", "topk", "num_cols"),
            ),
            (
                "sglang.kernels.ops.speculative.spec_tree:build_tree_kernel_efficient_func",
                ("seq_lens", "positions", "retrieve_index", "retrieve_next_token", "num_verify_tokens"),
            ),
            (
                "sglang.kernels.ops.speculative.spec_tree:verify_tree_greedy_func",
                ("predicts", "accept_index", "accept_token_num", "candidates", "retrieve_index", "target_predict"),
            ),
            (
                "sglang.kernels.ops.speculative.eagle:fill_bonus_tokens_func",
                ("accept_tokens", "accept_lens", "bonus_tokens", "accept_stride", "batch_size"),
            ),
            (
                "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func",
                ("req_pool_indices", "req_to_token", "start_offset", "end_offset", "out_cache_loc", "batch_size"),
            ),
            ("sglang.srt.speculative.draft_utils:DraftBackendFactory.create_decode_backend", ()),
            ("sglang.srt.speculative.draft_utils:DraftBackendFactory.create_draft_extend_backend", ()),
            ("sglang.srt.speculative.spec_utils:select_top_k_tokens", ("i", "topk_p", "topk_index", "topk")),
            ("sglang.srt.speculative.eagle_utils:tree_speculative_sampling_target_only", ()),
            ("sglang.srt.speculative.eagle_utils:top_k_renorm_prob", ()),
            ("sglang.srt.speculative.eagle_utils:top_p_renorm_prob", ()),
        )
    ),
    sglang("speculative.spec_info:SpeculativeAlgorithm.register", "registers FOURFOLD_MTP", ("name", "spec_class")),
    sglang("speculative.spec_info:SpeculativeAlgorithm.create_worker", "whose worker to extend", ("server_args",)),
    sglang("speculative.spec_info:SpeculativeAlgorithm.create_future_map", "EAGLE's answer", ("device",), _ALGORITHM),
    sglang("speculative.spec_info:SpeculativeAlgorithm.build_disagg_draft_input", "EAGLE's answer", ("batch",)),
    sglang("speculative.spec_info:SpeculativeAlgorithm.carries_draft_hidden_states", "EAGLE's", (), _ALGORITHM),
    sglang("speculative.spec_info:SpeculativeAlgorithm.need_topk", "EAGLE's answer", (), _ALGORITHM),
    sglang("speculative.spec_registry:CustomSpecAlgo.handle_server_args", "defaults and refusals", ("server_args",)),
    sglang("speculative.spec_registry:get_spec", "whether it is registered already", ("name",)),
    sglang("speculative.eagle_worker_v2:EAGLEWorkerV2._draft_worker", "drafts from the text too", until=_DRAFT_WORKER),
    sglang("speculative.eagle_worker_v2:EAGLEWorkerV2.verify", "reads what was verified", ("batch",), _DRAFT_WORKER),
    sglang(
        "speculative.eagle_worker_v2:EAGLEWorkerV2.on_verify_complete_cpu",
        "counts by source",
        ("num_correct_drafts_per_req", "batch_size"),
    ),
    sglang("speculative.eagle_worker_v2:EagleDraftWorker.draft", "places suffix drafts", ("batch",), _DRAFT_WORKER),
    sglang(
        "speculative.eagle_worker_v2:EagleDraftWorker.draft_forward",
        "drafts fewer tokens than are verified",
        ("forward_batch",),
        _DRAFT_WORKER,
    ),
    sglang(
        "speculative.eagle_worker_v2:EagleDraftWorker.cuda_graph_runner", "left out with the head", until=_DRAFT_WORKER
    ),
    sglang("speculative.eagle_worker_v2:EagleDraftWorker.speculative_num_steps", "the same", until=_DRAFT_WORKER),
    sglang(
        "speculative.eagle_worker_v2:EagleDraftWorker.speculative_num_draft_tokens", "the same", until=_DRAFT_WORKER
    ),
    sglang("speculative.eagle_info:EagleVerifyInput.draft_token", "places suffix drafts", until=_DRAFT_WORKER),
    sglang("speculative.eagle_info:EagleDraftInput.bonus_tokens", "the last verified token"),
    sglang("speculative.eagle_info:EagleDraftInput.topk_index", "the head's first draft"),
    sglang("managers.schedule_batch:ScheduleBatch.reqs", "the rows to draft for"),
    sglang("managers.schedule_batch:ScheduleBatch.seq_lens", "where each text ends"),
    sglang("managers.schedule_batch:ScheduleBatch.model_config", "which numbers are tokens"),
    sglang(
        "model_executor.forward_batch_info:ForwardBatch.out_cache_loc", "fewer steps of the head", until=_DRAFT_WORKER
    ),
    sglang("model_executor.forward_batch_info:ForwardBatch.positions", "fewer steps of the head", until=_DRAFT_WORKER),
    sglang("managers.schedule_batch:Req.origin_input_ids", "the text"),
    sglang("managers.schedule_batch:Req.output_ids", "the text"),
    sglang("managers.schedule_batch:Req.rid", "whose text"),
    sglang("managers.utils:GenerationBatchResult.accept_lens", "what was verified"),
    sglang("managers.utils:GenerationBatchResult.next_token_ids", "what was verified"),
    sglang("managers.utils:GenerationBatchResult.speculative_num_draft_tokens", "what was verified"),
    sglang("layers.sampler:top_p_normalize_probs_torch", "samples while it verifies", ("probs", "top_ps")),
    sglang("models.registry:ModelRegistry", "registers the draft class; finds the target's"),
    sglang("layers.layer_boundary.factories:layer_stack", "builds the decoder layer of a draft"),
    sglang("layers.layer_boundary.residual.batch:start", "runs it", ("forward_batch",)),
    sglang("layers.layer_boundary.residual.batch:fold", "runs it", ("hidden_states", "forward_batch")),
    sglang("layers.layer_boundary.residual.batch:take_output", "runs it", ("hidden_states", "forward_batch")),
    sglang(
        "layers.logits_processor:LogitsProcessor.forward",
        "logits, and the state that the next draft step gets",
        ("input_ids", "hidden_states", "lm_head", "logits_metadata", "hidden_states_before_norm"),
    ),
    sglang("model_loader.auto_loader:LLAMA_STACKED_MAPPING", "loads fused layers of a draft"),
    sglang("model_loader.weight_utils:default_weight_loader", "loads a draft", ("param", "loaded_weight")),
    sglang("model_loader.weight_utils:maybe_remap_kv_scale_name", "loads a draft", ("name", "params_dict")),
    sglang("layers.logits_processor:LogitsProcessorOutput", "what a draft returns"),
    sglang("layers.linear:ReplicatedLinear", "projections of a draft"),
    sglang("layers.layernorm:RMSNorm", "norms of a draft"),
    sglang("layers.layernorm:GemmaRMSNorm", "norms of a draft"),
    sglang("layers.vocab_parallel_embedding:VocabParallelEmbedding", "a draft's own embedding"),
    sglang("layers.dp_attention:is_dp_attention_enabled", "how a draft's embedding is split"),
    sglang("runtime_context:get_parallel", "how a draft's output head is split"),
    sglang("runtime_context:get_spec", "whether the CPU platform speculates, whether a token map is given"),
    sglang("platforms.interface:KVPoolKind", "which cache the CPU platform is asked for"),
    sglang("plugins.hook_registry:HookType", "replaces functions"),
    sglang("layers.attention.base_attn_backend:AttentionBackend", "attention of a draft's steps"),
    sglang("layers.vocab_parallel_embedding:ParallelLMHead", "a draft's own output head"),
    *RECIPES,
    *MLA,
    *LENGTH,
    *MODULES,
    *PARALLEL,
    *DEFERRED,
    *PROCESSES,
    *SAMPLING,
)


def source_root(engine: str) -> Path | None:
    """The folder that holds the installed engine's package, found without importing it; None where there is none."""
    spec = importlib.util.find_spec(engine)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).parent


def check(engine: str, root: Path) -> dict[Seam, str]:
    """Return the seams of ``engine`` that its source below ``root`` lacks, each with what was found."""
    problems: dict[Seam, str] = {}
    for seam in SEAMS:
        if seam.engine == engine:
            problem = missing(seam.path, seam.parameters, root)
            if problem is not None:
                problems[seam] = problem
    return problems

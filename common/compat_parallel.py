"""Rows of `fourfold.common.compat` for a draft length that SGLang's data-parallel ranks agree on, and such on a CPU."""

from __future__ import annotations

from functools import partial

from fourfold.common.seam import Seam, sglang

_RANKS = "SGLang's adaptive length works under attention data parallelism (its pull request 35898)"
_CPU = "SGLang's platform for a CPU out of tree runs its data parallelism"
_CONTROLLER = "speculative.adaptive_runtime_state:AdaptiveController"
_POLICY = "speculative.adaptive_spec_params:AdaptiveSpeculativeParams"
_GATHER = "managers.scheduler_components.dp_attn:MLPSyncBatchInfo"
_REFUSED = "refused with it"
_agreed, _on_cpu = (partial(sglang, until=until) for until in (_RANKS, _CPU))

PARALLEL: tuple[Seam, ...] = (
    _agreed(
        "speculative.adaptive_spec_params:adaptive_unsupported_reason",
        "hooked: does not speak against ranks that agree",
        ("server_args",),
    ),
    _agreed(f"{_CONTROLLER}.__init__", "hooked: its policy hears what all ranks saw", ("worker", "policy")),
    _agreed(f"{_CONTROLLER}.params", "the policy"),
    _agreed(f"{_POLICY}.candidate_steps", "passed on"),
    _agreed(f"{_POLICY}.set_cuda_graph_bs", "passed on", ("cuda_graph_bs",)),
    _agreed(f"{_POLICY}.cuda_graph_bs_for_step", "passed on", ("step",)),
    _agreed(f"{_POLICY}.get_steps_for_batch", "asked for the largest batch of any rank", ("batch_size",)),
    _agreed(
        f"{_POLICY}.on_verify_complete",
        "told the mean over the requests of all ranks",
        ("num_correct_drafts_per_req", "batch_size"),
    ),
    _agreed(f"{_GATHER}._get_local_tensor", "hooked: carries what a rank saw", ("device", "dtype")),
    _agreed(f"{_GATHER}._get_fallback_tensor", "hooked: as long as that", ("device", "dtype")),
    _agreed(f"{_GATHER}.all_gather", "hooked: then all know it", ("device", "group")),
    _agreed(f"{_GATHER}.tp0_info_cpu", "what all saw"),
    _agreed(f"{_GATHER}.global_num_tokens", "the largest batch"),
    _agreed(f"{_GATHER}.is_extend_in_batch", "whether all ranks decode"),
    _agreed("arg_groups.overrides:resolved_view", "what is refused with it"),
    _agreed("runtime_context:attn_dp_enabled_of", "whether there is anything to agree on", ("cfg",)),
    _agreed("arg_groups.fields.parallel:Parallel.attn_dp_enabled", "the same in a worker"),
    _agreed("arg_groups.fields.parallel:Parallel.attn_dp_size", "how many agree"),
    _agreed("arg_groups.fields.parallel:Parallel.pp_size", _REFUSED),
    _agreed("arg_groups.fields.exec_:ExecOverlap.enable_two_batch_overlap", _REFUSED),
    _agreed("arg_groups.fields.exec_:ExecMoe.elastic_ep_backend", _REFUSED),
    _agreed("arg_groups.fields.disagg:Disagg.enable_pdmux", _REFUSED),
    _agreed("environ:envs", _REFUSED),
    _agreed("environ:Envs.SGLANG_SCHEDULER_SKIP_ALL_GATHER", _REFUSED),
    _agreed("environ:Envs.SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION", _REFUSED),
    sglang("runtime_context:get_context", "whether a process is asked for a worker, or options are read"),
    sglang("runtime_context:RuntimeContext.is_config_namespace_published", "the same", ("name",)),
    _on_cpu("layers.dp_attention:memcpy_func", "set to the next"),
    _on_cpu(
        "layers.dp_attention:memcpy_cpu",
        "copies rows between ranks without Triton",
        ("dst", "src", "dim", "offset", "sz", "offset_src"),
    ),
    _on_cpu("model_executor.forward_batch_info:_is_cpu", "set, for nothing can be pinned"),
    _on_cpu("distributed.parallel_state:_is_cpu", "set, for operators that are there for GPUs alone"),
    _on_cpu(
        "layers.attention.intel_amx_backend:IntelAMXAttnBackend.get_cpu_graph_seq_len_fill_value",
        "answered by the attention that verifies too",
    ),
)

"""Rows of `fourfold.common.compat` for the length that the head of SGLang's ``FOURFOLD_MTP`` learns."""

from __future__ import annotations

from fourfold.common.seam import Seam, sglang

_CONTROLLER = "speculative.adaptive_runtime_state:AdaptiveController"
_POLICY = "speculative.adaptive_runtime_state:AdaptiveSpecPolicy"
_WORKER = "speculative.eagle_worker_v2:EAGLEWorkerV2"
_LENGTH = "SGLang lets an algorithm out of tree bring a policy of draft lengths"
_FIXED = "where it is on, the length stays fixed"

LENGTH: tuple[Seam, ...] = (
    sglang(
        f"{_WORKER}.forward_batch_generation",
        "plans a step before the length is set",
        ("batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"),
        _LENGTH,
    ),
    sglang(f"{_WORKER}.adaptive_controller", "sets the length of each step", until=_LENGTH),
    sglang(f"{_WORKER}.init_cuda_graphs", "lets it prepare for each length", until=_LENGTH),
    sglang(f"{_WORKER}.activate_step_by_batch", "asks it before each step", ("batch_size",), _LENGTH),
    sglang(f"{_WORKER}._build_trivial_verify_input", "a step that drafts nothing", ("batch",), _LENGTH),
    sglang(f"{_WORKER}.apply_runtime_state", "writes a line that is left out", ("state",), _LENGTH),
    sglang(f"{_CONTROLLER}.__init__", "is given a policy", ("worker", "policy"), _LENGTH),
    sglang(f"{_CONTROLLER}.init_states", "prepares for each length", ("cuda_graph_bs",), _LENGTH),
    sglang(
        f"{_CONTROLLER}.on_verify_complete", "tells what was accepted", ("num_correct_drafts_per_req", "batch_size")
    ),
    sglang(f"{_POLICY}.candidate_steps", "implemented: the lengths"),
    sglang(f"{_POLICY}.set_cuda_graph_bs", "implemented", ("cuda_graph_bs",)),
    sglang(f"{_POLICY}.cuda_graph_bs_for_step", "implemented: all of them", ("step",)),
    sglang(f"{_POLICY}.get_steps_for_batch", "implemented: what was planned", ("batch_size",)),
    sglang(
        f"{_POLICY}.on_verify_complete",
        "implemented: learns from the oldest step",
        ("num_correct_drafts_per_req", "batch_size"),
    ),
    sglang("managers.schedule_batch:ScheduleBatch.is_extend_in_batch", "whether a step reads prompts"),
    sglang("distributed.parallel_state:get_tp_group", "whose ranks agree on a step's duration"),
    sglang("layers.dp_attention:is_dp_attention_enabled", _FIXED),
    sglang("arg_groups.fields.exec_:ExecOverlap.enable_two_batch_overlap", _FIXED),
    sglang("arg_groups.fields.disagg:Disagg.enable_pdmux", _FIXED),
    sglang("arg_groups.fields.memory:Memory.enable_hisparse", _FIXED),
)

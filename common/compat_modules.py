"""Rows of `fourfold.common.compat` for heads of several modules."""

from __future__ import annotations

from fourfold.common.compat_deferred import PROPOSED
from fourfold.common.seam import Seam, sglang, vllm

_CHAIN = "SGLang asks a draft's class whether its modules read each other's states"
_KERNEL = "SGLang speculates on out-of-tree platforms without Triton"
_MODULES = "vLLM's V1 model runner uses all modules of a head"
_PROPOSER = "v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_WORKER = "speculative.multi_layer_eagle_worker_v2"

MODULES: tuple[Seam, ...] = (
    vllm(f"{_PROPOSER}.propose", "drafts one token with each module", PROPOSED, _MODULES),
    vllm(f"{_PROPOSER}.load_model", "sees the states of a run", ("target_model",), _MODULES),
    vllm(f"{_PROPOSER}.model", "the head", until=_MODULES),
    vllm(f"{_PROPOSER}.input_ids", "the tokens of the next module", until=_MODULES),
    vllm(f"{_PROPOSER}._last_draft_probs", "the probabilities of all drafted tokens", until=_MODULES),
    vllm(
        "v1.spec_decode.eagle:EagleProposer.__init__",
        "the drafter that runs them",
        ("vllm_config", "device", "runner"),
        _MODULES,
    ),
    sglang("arg_groups.fields.spec:Spec.enable_multi_layer_eagle", "a model for each drafted token"),
    sglang("configs.load_config:LoadConfig.draft_model_idx", "which token a draft model drafts"),
    sglang(
        "model_loader.loader:DefaultModelLoader._filter_mtp_weights",
        "what it makes of a module's number is undone",
        ("draft_model_idx",),
    ),
    sglang(f"{_WORKER}:MultiLayerEagleDraftWorker.init_lm_head", "hooked, to say that they chain", until=_CHAIN),
    sglang(f"{_WORKER}:MultiLayerEagleDraftWorker.chain_mtp_hidden_states", "says that they chain", until=_CHAIN),
    sglang(f"{_WORKER}:MultiLayerEagleDraftWorker.draft_runner", "whether the draft is ours", until=_CHAIN),
    Seam(
        "sglang",
        "sglang.kernels.ops.speculative.multi_layer_eagle:rotate_input_ids",
        "replaced on a CPU, for it launches a kernel",
        ("input_ids", "extend_start_loc", "extend_seq_lens", "topk_index", "select_index"),
        _KERNEL,
    ),
)

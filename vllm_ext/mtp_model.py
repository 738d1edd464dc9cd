"""``FourfoldMTP``: the MTP head that a draft directory describes, around the target's own decoder layer.

vLLM's V1 model runner drafts with the first module alone, or with `modules_worker` one token with each; its V2 runner
uses one after the other, and again from the first where it drafts more tokens than there are modules. Both share the
target's embedding and output head unless the head has its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.communication_op import tensor_model_parallel_all_gather
from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_cls
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, get_draft_quant_config, maybe_prefix

from fourfold.common.errors import FourfoldError
from fourfold.common.log import get_logger
from fourfold.common.mtp.formats import PLAIN
from fourfold.common.mtp.head import BLOCK, Formula, MtpHead
from fourfold.common.mtp.layer_class import FillsCache, arguments, decoder_layer, without_feed_forward
from fourfold.common.mtp.vocabulary import DraftVocabulary, Product

# Fused modules of vLLM's layers, as packed_modules_mapping says them; a target's own mapping comes on top.
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}


MODULES_WORKER = "fourfold.vllm_ext.modules_worker.ModulesWorker"


def used_modules(vllm_config: VllmConfig, head: MtpHead) -> int:
    """How many modules the model runner uses."""
    several = vllm_config.use_v2_model_runner or vllm_config.parallel_config.worker_cls == MODULES_WORKER
    return min(len(head.modules), vllm_config.num_speculative_tokens) if several else 1


def _one_module(vllm_config: VllmConfig) -> bool:
    head = MtpHead.from_config(vllm_config.model_config.hf_config.fourfold_mtp)
    return used_modules(vllm_config, head) == 1


# Compiled modules cannot share a process's compile cache, so several run eagerly, as those of vLLM do.
@support_torch_compile(
    dynamic_arg_dims={"positions": -1, "hidden_states": 0, "inputs_embeds": 0}, enable_if=_one_module
)
class _Module(nn.Module):
    """One MTP module; ``prefix`` is that of a decoder layer."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str, formula: Formula, roles: Iterable[str], layer: type
    ) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.formula = formula
        size = config.hidden_size

        def norm() -> nn.Module:
            return (GemmaRMSNorm if formula.unit_offset_norm else RMSNorm)(size, eps=config.rms_norm_eps)

        def linear(role: str, columns: int) -> nn.Module:
            name = f"{prefix}.{role}"
            return ReplicatedLinear(
                columns, size, bias=False, quant_config=quant_config, prefix=name, return_bias=False
            )

        self.enorm, self.hnorm = norm(), norm()
        self.norm = norm() if "norm" in roles else nn.Identity()
        self.split = "e_proj" in roles
        if self.split:
            self.e_proj, self.h_proj = linear("e_proj", size), linear("h_proj", size)
        else:
            self.eh_proj = linear("eh_proj", 2 * size)
        offered = {
            "vllm_config": vllm_config,
            "model_config": vllm_config.model_config,
            "cache_config": vllm_config.cache_config,
            "parallel_config": vllm_config.parallel_config,
            "config": config,
            "quant_config": quant_config,
            "prefix": prefix,
            "layer_idx": int(prefix.rpartition(".")[2]),
            **dict.fromkeys(("is_mtp", "is_nextn", "is_mtp_block", "is_mtp_layer"), True),
        }
        self.block = layer(**arguments(layer.__init__, offered, layer.__name__))
        inputs = {"positions": None, "hidden_states": None, "residual": None}
        self.extra = arguments(layer.forward, inputs, f"{layer.__name__}.forward").keys() & {"residual"}

    def forward(self, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor) -> Tensor:
        formula = self.formula
        if formula.mask_first_position:
            first = positions if positions.ndim == 1 else positions[0]
            inputs_embeds = torch.where(first.unsqueeze(-1) == 0, 0, inputs_embeds)
        embedding, hidden = self.enorm(inputs_embeds), self.hnorm(hidden_states)
        if self.split:
            x = self.e_proj(embedding) + self.h_proj(hidden)
        else:
            x = self.eh_proj(torch.cat([embedding, hidden] if formula.embedding_first else [hidden, embedding], -1))
        out = self.block(positions=positions, hidden_states=x, **dict.fromkeys(self.extra))
        x = out[0] + out[1] if isinstance(out, tuple) else out
        if x.shape[0] != positions.shape[-1]:  # a layer of sequence-parallel experts returns a part for each rank
            x = tensor_model_parallel_all_gather(x, 0)[: positions.shape[-1]]
        return self.norm(x) if formula.feedback == "post_norm" else x

    def fill_cache(self, **inputs: Tensor) -> Tensor:
        """`forward` without the layer's feed-forward part, on which no cache entry depends; the output is void."""
        with without_feed_forward(self.block):
            return self.forward(**inputs)


def _packed(weight: Tensor) -> Product:
    """vLLM's own product with ``weight`` on a CPU."""
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda hidden: layer.cpu_linear(hidden, layer.weight, None)


class FourfoldMTP(FillsCache, nn.Module):
    """The head of a draft directory that ``fourfold mtp extract`` wrote."""

    model: Any
    lm_head: Any
    step = 0  # the step of a draft, where the model runner does not say

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        target, draft = vllm_config.model_config, vllm_config.speculative_config.draft_model_config
        self.config = config = draft.hf_config
        self.head = head = MtpHead.from_config(getattr(config, "fourfold_mtp", None))
        target_class = get_model_cls(target)
        self.fused = FUSED | getattr(target_class, "packed_modules_mapping", {})
        # vLLM hands the target's model config and quantisation over.
        vllm_config = copy.copy(vllm_config)
        vllm_config.quant_config = self.quant_config = get_draft_quant_config(vllm_config)
        vllm_config.model_config = draft
        if self.quant_config is not None:
            self.quant_config.packed_modules_mapping = self.fused
        self._check(vllm_config, target)
        self.count = used_modules(vllm_config, head)
        layer = decoder_layer(target_class)
        get_logger(__name__).info(
            "fourfold: MTP head %s around %s, %d of %d modules draft",
            *(head.family, layer.__name__, self.count, len(head.modules)),
        )
        roles = head.modules[0].roles
        prefix = maybe_prefix(prefix, "model")
        for name, value in vars(config).items():
            if isinstance(value, list) and len(value) == head.target_layers:  # one entry a layer: go on as the last
                setattr(config, name, value + value[-1:] * self.count)
        self.model = nn.Module()
        with set_current_vllm_config(vllm_config, prefix=prefix):
            self.model.layers = nn.ModuleList(
                _Module(
                    vllm_config=vllm_config,
                    prefix=f"{prefix}.layers.{head.target_layers + i}",
                    formula=head.formula,
                    roles=module.roles,
                    layer=layer,
                )
                for i, module in enumerate(head.modules[: self.count])
            )
            # vLLM shares the target's where these are absent.
            if "embedding" in roles:
                self.has_own_embed_tokens = True
                self.model.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
            if "head" in roles:
                self.has_own_lm_head = True
                self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix="lm_head")
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.words: Tensor | None = None  # the draft vocabulary
        self.vocabulary: list[DraftVocabulary] = []

    def _check(self, vllm_config: VllmConfig, target: Any) -> None:
        head, text = self.head, target.hf_text_config
        if head.limits or head.formula.target_embedding_norm:
            raise FourfoldError(f"FourfoldMTP does not compute this head: {head.limits or 'target_embedding_norm'}")
        if (text.num_hidden_layers, text.hidden_size) != (head.target_layers, head.hidden_size):
            raise FourfoldError(
                f"{self.config.name_or_path} is the head of a model of {head.target_layers} layers and hidden size "
                f"{head.hidden_size}; {target.model} has {text.num_hidden_layers} and {text.hidden_size}"
            )
        for role in ("head", "embedding"):
            found = head.modules[0].formats.get(role, "bf16")
            if found not in PLAIN.values():
                raise FourfoldError(f"the MTP head's own {role} is stored as {found}; FourfoldMTP takes it unquantised")
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1 and "embedding" not in head.modules[0].roles:
            raise FourfoldError("FourfoldMTP needs the target's embedding: use --pipeline-parallel-size 1")
        if parallel.enable_eplb:
            raise FourfoldError("FourfoldMTP does not move experts: leave out --enable-eplb")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int | None = None,
    ) -> Tensor:
        """One draft step.

        Args:
            input_ids: [T] the tokens after ``positions``.
            positions: [T], or [3, T] with multimodal rotary embedding.
            hidden_states: [T, hidden] of the target or of the step before, at ``positions``.
            spec_step_idx: the step, hence the module; None: `step`.

        Returns:
            [T, hidden] that the next step takes, and `compute_logits`.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        module = self._module(spec_step_idx)
        run = module.fill_cache if self._filling_cache else module
        return run(positions=positions, hidden_states=hidden_states, inputs_embeds=inputs_embeds)

    def _module(self, step: int | None) -> Any:
        return self.model.layers[(self.step if step is None else step) % self.count]

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int | None = None) -> Tensor | None:
        """[T, vocabulary] of what `forward` returned."""
        hidden_states = self._normed(hidden_states, spec_step_idx)
        drafted = self._drafted()
        if drafted is None:
            return self.logits_processor(self.lm_head, hidden_states)
        return tensor_model_parallel_all_gather(drafted.logits(hidden_states))[:, : self.config.vocab_size]

    def get_top_tokens(self, hidden_states: Tensor, spec_step_idx: int | None = None) -> Tensor:
        """[T] the likeliest words, where ``use_local_argmax_reduction`` is set: without logits of all words."""
        drafted = self._drafted()
        if drafted is None:
            return self.logits_processor.get_top_tokens(self.lm_head, self._normed(hidden_states, spec_step_idx))
        if get_tensor_model_parallel_world_size() > 1:
            logits = self.compute_logits(hidden_states, spec_step_idx)
            assert logits is not None
            return logits.argmax(-1)
        return drafted.top(self._normed(hidden_states, spec_step_idx))

    def _normed(self, hidden_states: Tensor, step: int | None) -> Tensor:
        if self.head.formula.feedback == "post_norm":
            return hidden_states
        return self._module(step).norm(hidden_states)

    def _drafted(self) -> DraftVocabulary | None:
        """The draft vocabulary's part of the output head, once vLLM has shared that; None where the head drafts all."""
        if self.words is not None and not self.vocabulary:
            weight = getattr(self.lm_head, "weight", None)
            if weight is None or not weight.is_floating_point():
                get_logger(__name__).info("fourfold: the output head is quantised, so the MTP head drafts all words")
                self.words = None
            else:
                start = self.lm_head.shard_indices.org_vocab_start_index
                prepare = _packed if weight.device.type == "cpu" else None
                self.vocabulary.append(DraftVocabulary(self.words, weight.detach(), start, prepare))
        return self.vocabulary[0] if self.words is not None else None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load what the head's description places; the draft directory's shards hold tensors of the target too."""
        stacked: dict[str, tuple[str, Any]] = {}
        for name, module in self.named_modules():
            parent, _, last = name.rpartition(".")
            for i, shard in enumerate(self.fused.get(last, ())):
                part = "qkv"[i] if isinstance(module, QKVParallelLinear) else i
                stacked[f"{parent}.{shard}."] = (f"{name}.", part)
        return AutoWeightsLoader(self).load_weights(
            self._named(weights), mapper=WeightsMapper(orig_to_new_stacked=stacked)
        )

    def _named(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        own: dict[tuple[str, str], Tensor] = {}
        for name, weight in weights:
            for i, role, rest in self.head.locate(name):
                if i >= self.count:
                    continue
                if role == "vocabulary":
                    self.words = weight
                elif role not in ("head", "embedding"):
                    part = BLOCK if role == BLOCK else role
                    yield f"model.layers.{i}.{part}.{rest}", weight
                elif (role, rest) not in own:
                    own[role, rest] = weight
                    yield f"{'lm_head' if role == 'head' else 'model.embed_tokens'}.{rest}", weight
                elif not torch.equal(own[role, rest], weight):
                    raise FourfoldError(f"{name} differs from that of another module; FourfoldMTP has one {role}")

"""``FourfoldMTP``: the MTP head that a draft directory describes, around the target's own decoder layer.

SGLang's EAGLE drafts every token with one model, which is the first module. With ``--enable-multi-layer-eagle`` it has
one for each token of a draft, with a KV cache of its own: the module of that token, and again the first after the last.
SGLang hands the target's embedding and output head over; a head's own replace them. Attention is what the target's
layer has, sparse attention excepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.layer_boundary.factories import layer_stack
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.auto_loader import LLAMA_STACKED_MAPPING
from sglang.srt.model_loader.weight_utils import default_weight_loader, maybe_remap_kv_scale_name
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel, get_spec
from sglang.srt.utils.common import BumpAllocator
from torch import Tensor, nn
from transformers import PretrainedConfig

from fourfold.common.errors import FourfoldError
from fourfold.common.log import get_logger
from fourfold.common.mtp.formats import PLAIN
from fourfold.common.mtp.head import BLOCK, Formula, MtpHead
from fourfold.common.mtp.layer_class import FillsCache, arguments, decoder_layer, without_feed_forward
from fourfold.sglang_ext import mla
from fourfold.sglang_ext.hooks import install

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(\w+)")
_RENAMED = re.compile(r"model\.mtp\.layers\.0\.")  # what SGLang makes of the number, for one model of several
_DRAFT_WORKER = "sglang.srt.speculative.multi_layer_eagle_worker_v2.MultiLayerEagleDraftWorker"
_EXPERT_PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "w1": "w1", "w2": "w2", "w3": "w3"}


class _Module(nn.Module):
    """One MTP module; ``prefix`` is that of a decoder layer."""

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None, prefix: str, head: MtpHead, index: int
    ) -> None:
        super().__init__()
        self.formula: Formula = head.formula
        roles, size = head.modules[index].roles, head.hidden_size

        def norm() -> nn.Module:
            return (GemmaRMSNorm if self.formula.unit_offset_norm else RMSNorm)(size, eps=config.rms_norm_eps)

        def linear(role: str, columns: int) -> nn.Module:
            return ReplicatedLinear(columns, size, bias=False, quant_config=quant_config, prefix=f"{prefix}.{role}")

        self.enorm, self.hnorm = norm(), norm()
        self.norm = norm() if "norm" in roles else nn.Identity()
        self.split = "e_proj" in roles
        if self.split:
            self.e_proj, self.h_proj = linear("e_proj", size), linear("h_proj", size)
        else:
            self.eh_proj = linear("eh_proj", 2 * size)
        layer = decoder_layer(ModelRegistry.resolve_model_cls(config.target_architecture)[0])
        # layer_id is the place in the draft's own KV cache.
        offered = {
            "config": config,
            "layer_id": 0,
            "quant_config": quant_config,
            "is_nextn": True,
            "prefix": prefix,
            "skip_rope": getattr(config, "qk_rope_head_dim", None) == 0,
        }
        with layer_stack():
            self.block = layer(**arguments(layer.__init__, offered, layer.__name__))
        inputs = dict.fromkeys(("positions", "hidden_states", "forward_batch", "zero_allocator"))
        self.allocates = "zero_allocator" in arguments(layer.forward, inputs, f"{layer.__name__}.forward")

    def forward(self, positions: Tensor, embedding: Tensor, forward_batch: ForwardBatch) -> Tensor:
        """[T, hidden] before ``norm``."""
        formula, x = self.formula, embedding
        if len(positions):  # ranks without requests only take part in the layer's collectives
            if formula.mask_first_position:
                embedding = torch.where(positions[:, None] == 0, 0, embedding)
            embedding, hidden = self.enorm(embedding), self.hnorm(forward_batch.spec_info.hidden_states)
            if self.split:
                x = self.e_proj(embedding)[0] + self.h_proj(hidden)[0]
            else:
                pair = [embedding, hidden] if formula.embedding_first else [hidden, embedding]
                x = self.eh_proj(torch.cat(pair, -1))[0]
        residual_batch.start(forward_batch)
        # Two zeros for the scales of an FP8 MLA layer's inputs.
        more = {"zero_allocator": BumpAllocator(2, torch.float32, x.device)} if self.allocates else {}
        x = self.block(positions=positions, hidden_states=x, forward_batch=forward_batch, **more)
        x = x[0] if isinstance(x, tuple) else x  # beside the indices of sparse attention
        return residual_batch.take_output(residual_batch.fold(x, forward_batch), forward_batch)


class FourfoldMTP(FillsCache, nn.Module):
    """The head of a draft directory that ``fourfold mtp extract --engine sglang`` wrote.

    Args:
        draft_model_idx: which token of a draft, where SGLang builds a model for each.
    """

    start_layer, end_layer = 0, 1
    packed_modules_mapping = mla.FUSED
    steps: WeakValueDictionary[int, FourfoldMTP] = WeakValueDictionary()  # of this process, by `draft_model_idx`

    def __init__(
        self,
        config: PretrainedConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        draft_model_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.config: Any = config
        self.quant_config = quant_config
        self.head = head = MtpHead.from_config(getattr(config, "fourfold_mtp", None))
        step, count = draft_model_idx or 0, len(head.modules)
        self.index = step % count
        self.roles = head.modules[self.index].roles
        self.again = step >= count
        # In a tuple, for the model that first used a module loads its weights.
        self.source = (self.steps[self.index] if self.again else self,)
        if draft_model_idx is not None:
            self.steps[step] = self
            install({f"{_DRAFT_WORKER}.init_lm_head": _pass_states_on}, HookType.AFTER)
            get_logger(__name__).info("fourfold: MTP module %d of %d drafts token %d", self.index + 1, count, step + 1)
        elif count > 1:
            get_logger(__name__).info(
                "fourfold: MTP module 1 of %d drafts every token; --enable-multi-layer-eagle uses all", count
            )
        if self.again:
            return
        self._check()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, head.hidden_size, use_attn_tp_group=is_dp_attention_enabled()
        )
        self.model = _Module(config, quant_config, f"model.layers.{head.target_layers + self.index}", head, self.index)
        self.lm_head = ParallelLMHead(
            config.vocab_size, head.hidden_size, use_attn_tp_group=get_parallel().enable_dp_lm_head
        )
        self.logits_processor = LogitsProcessor(config)

    def _check(self) -> None:
        head = self.head
        if head.limits or head.formula.target_embedding_norm:
            raise FourfoldError(f"FourfoldMTP does not compute this head: {head.limits or 'target_embedding_norm'}")
        mla.check(self.config)
        for role in ("head", "embedding"):
            found = head.modules[self.index].formats.get(role, "bf16")
            if found not in PLAIN.values():
                raise FourfoldError(f"the MTP head's own {role} is stored as {found}; FourfoldMTP takes it unquantised")

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch, input_embeds: Tensor | None = None
    ) -> LogitsProcessorOutput:
        """One draft step.

        Args:
            input_ids: [T] the tokens after ``positions``.
            positions: [T].
            forward_batch: its ``spec_info.hidden_states`` is [T, hidden], of the target or of the step before.
        """
        (own,) = self.source
        embedding = own.embed_tokens(input_ids) if input_embeds is None else input_embeds
        if self._filling_cache:
            with without_feed_forward(own.model.block):
                own.model(positions, embedding, forward_batch)
            return LogitsProcessorOutput(next_token_logits=None)
        hidden = own.model(positions, embedding, forward_batch)
        normed = own.model.norm(hidden) if len(hidden) else hidden
        before = hidden if self.head.formula.feedback == "pre_norm" else None
        return own.logits_processor(input_ids, normed, own.lm_head, forward_batch, hidden_states_before_norm=before)

    def get_embed_and_head(self) -> tuple[Tensor, Tensor]:
        (own,) = self.source
        return own.embed_tokens.weight, own.lm_head.weight

    def set_embed_and_head(self, embed: Tensor | None, head: Tensor | None) -> None:
        """Take the target's embedding and output head, unless the head has its own.

        Raises:
            FourfoldError: they are of another model.
        """
        if self.again:
            return
        for role, module, weight in (("embedding", self.embed_tokens, embed), ("head", self.lm_head, head)):
            if role in self.roles or weight is None:
                continue
            mapped = role == "head" and get_spec().speculative_token_map is not None
            if weight.shape[mapped:] != module.weight.shape[mapped:]:  # a token map leaves some rows of the head
                raise FourfoldError(
                    f"the target's {role} is {list(weight.shape)}, this draft was written for a model with "
                    f"{list(module.weight.shape)}; write it again from the target"
                )
            del module.weight
            module.weight = weight

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load what the head's description places; the draft directory's shards hold tensors of the target too.

        Raises:
            FourfoldError: the target's decoder layer lacks a tensor of the head, or has another.
        """
        if self.again:
            return
        parameters = dict(self.named_parameters())
        halves = mla.Halves(parameters)
        loaded: set[str] = set()
        own = {"head": "lm_head", "embedding": "embed_tokens", BLOCK: "model.block"}
        for name, weight in weights:
            for i, role, rest in self.head.locate(_RENAMED.sub(f"model.mtp.layers.{self.index}.", name)):
                place = f"{own.get(role, f'model.{role}')}.{rest}"
                if rest.endswith("_scale"):  # drops scales of an FP8 cache that this server does not have
                    place = maybe_remap_kv_scale_name(place, parameters)
                if i != self.index or place is None or role == "vocabulary":  # --speculative-token-map has its place
                    continue
                whole = halves.join(place, weight)
                if whole is not None:
                    loaded.add(_load(parameters, whole[0], name, whole[1]))
        shared = {f"{own[role]}.weight" for role in ("head", "embedding") if role not in self.roles}
        missing = sorted(p for p in set(parameters) - loaded - shared if p.endswith("weight"))
        if missing:
            raise FourfoldError(f"the MTP head has no {', '.join(missing)}; its decoder layer is not the target's")
        self.post_load_weights()

    def post_load_weights(self) -> None:
        """What follows loading; SGLang calls it where it loads weights without `load_weights`."""
        if not self.again:
            mla.absorb(self.model.block, self.config, self.quant_config)


def _pass_states_on(result: None, worker: Any) -> None:
    """Let each module read the state of the one before it, which SGLang does for the classes that it lists."""
    if isinstance(worker.draft_runner.model, FourfoldMTP):
        worker.chain_mtp_hidden_states = True


def _load(parameters: dict[str, Any], place: str, name: str, weight: Tensor) -> str:
    """Load one tensor into the parameter that it is or is a part of; returns the parameter's name."""
    expert = _EXPERT.fullmatch(place)
    if expert and expert[3] in _EXPERT_PARTS:
        part = _EXPERT_PARTS[expert[3]]
        place = f"{expert[1]}.{'w2' if part == 'w2' else 'w13'}_{expert[4]}"
        if place in parameters:
            loader: Any = parameters[place].weight_loader
            loader(parameters[place], weight, place, shard_id=part, expert_id=int(expert[2]))
    else:
        # A layer may have one of the names that others fuse, as q_proj beside MLA.
        stacked = None if place in parameters else LLAMA_STACKED_MAPPING.try_load(place, weight, parameters)
        place = stacked or place
        if not stacked and place in parameters:
            getattr(parameters[place], "weight_loader", default_weight_loader)(parameters[place], weight)
    if place not in parameters:
        raise FourfoldError(f"{name} of the MTP head has no place in the target's decoder layer ({place})")
    return place


EntryClass = FourfoldMTP

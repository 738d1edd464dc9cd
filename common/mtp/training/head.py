"""The head that is trained: DeepSeek-V3's module around a decoder layer of the target's class, on whole sequences.

Step s of a chain that starts at column i reads the head's own state of step s - 1, attends to the columns up to i of
step 0 and to column i of each step since, as in an engine, whose cache holds exactly these entries. All chains of a
sequence are computed at once: the keys of the steps lie one after the other in one cache under a mask (EAGLE-3's
training-time test, arXiv 2503.01840). The formula is that of `layouts.FAMILIES`' ``deepseek_v3``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.common.errors import FourfoldError

VOCABULARY = "shared_head.vocabulary"


class TrainedHead(nn.Module):
    """One MTP module.

    Args:
        target: a transformers causal language model whose decoder layers are called as Llama's.
        vocabulary: [W] int64, the words that are drafted.

    Raises:
        FourfoldError: the model has no such layers.
    """

    vocabulary: Tensor
    embedding: Tensor
    words: Tensor

    def __init__(self, target: Any, vocabulary: Tensor) -> None:
        super().__init__()
        inner = target.model
        missing = [part for part in ("layers", "norm", "rotary_emb", "embed_tokens") if not hasattr(inner, part)]
        if missing:
            raise FourfoldError(f"{type(target).__name__}.model has no {missing[0]}; a head cannot be trained for it")
        self.layer_count, size = len(inner.layers), inner.config.hidden_size
        self.block = copy.deepcopy(inner.layers[-1]).float()
        for module in self.block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = 0
                module.config._attn_implementation = "sdpa"  # takes the mask below
        self.norm = copy.deepcopy(inner.norm).float()
        self.enorm, self.hnorm = (copy.deepcopy(self.norm) for _ in range(2))
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self._begin(size)
        self.requires_grad_(True)  # a copy of a frozen parameter is frozen
        self.rotary_emb = copy.deepcopy(inner.rotary_emb)
        self.register_buffer("vocabulary", vocabulary)
        self.register_buffer("embedding", inner.embed_tokens.weight.detach(), persistent=False)
        self.register_buffer("words", target.lm_head.weight.detach()[vocabulary], persistent=False)

    @torch.no_grad()
    def _begin(self, size: int) -> None:
        """Set the weights to start from: the target's state, undone of its norm's weight, passes through."""
        for weight in self.block.parameters():
            if weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
        for name, module in self.block.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                nn.init.zeros_(module.weight)
        scale = self.norm.weight.square().mean().sqrt()
        self.hnorm.weight.copy_(scale / self.norm.weight.clamp_min(0.1 * scale))
        nn.init.ones_(self.enorm.weight)
        self.eh_proj.weight.normal_(0, 0.5 * (2 * size) ** -0.5)
        self.eh_proj.weight[:, size:].copy_(torch.eye(size))

    def states(self, tokens: Tensor, hidden: Tensor, steps: int) -> list[Tensor]:
        """The feedback of each step, after ``norm``.

        Args:
            tokens: [B, T + steps] int64; column i is the token after the position of ``hidden``'s column i.
            hidden: [B, T, H] float32, the target's states after its final norm.

        Returns:
            ``steps`` tensors [B, T, H]; column i of step s predicts ``tokens`` column i + s + 1.
        """
        from transformers import DynamicCache

        count = hidden.shape[1]
        cache = DynamicCache()
        places = torch.arange(count, device=hidden.device)
        causal, own = places[:, None] >= places, places[:, None] == places
        out = []
        for step in range(steps):
            words = self.embedding[tokens[:, step : step + count]].float()
            if step == 0:
                words = words * (places > 0)[:, None]  # the formula's mask of the first position
            joined = self.eh_proj(torch.cat([self.enorm(words), self.hnorm(hidden)], -1))
            positions = (places + step)[None]
            mask = torch.cat([causal] + [own] * step, 1)[None, None]
            hidden = self.block(
                joined,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                position_embeddings=self.rotary_emb(joined, positions),
            )
            hidden = self.norm(hidden[0] if isinstance(hidden, tuple) else hidden)
            out.append(hidden)
        return out

    def _named(self) -> dict[str, Tensor]:
        """The parameters under their names in a checkpoint."""
        named = {f"{role}.weight": getattr(self, role).weight for role in ("enorm", "hnorm", "eh_proj")}
        named |= {"shared_head.norm.weight": self.norm.weight, **dict(self.block.named_parameters())}
        return {f"model.layers.{self.layer_count}.{name}": weight for name, weight in named.items()}

    def tensors(self) -> Mapping[str, Tensor]:
        """The head as a checkpoint names it, in BF16."""
        found = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in self._named().items()}
        return found | {f"model.layers.{self.layer_count}.{VOCABULARY}.weight": self.vocabulary.to(torch.int32)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of a head that `tensors` gave; its vocabulary may be another one.

        Raises:
            FourfoldError: it is another model's.
        """
        with torch.no_grad():
            for name, weight in self._named().items():
                if name not in tensors or tensors[name].shape != weight.shape:
                    raise FourfoldError(f"the head to begin from has no {name} of shape {list(weight.shape)}")
                weight.copy_(tensors[name])

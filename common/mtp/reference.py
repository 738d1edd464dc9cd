"""A plain PyTorch MTP head without an engine or a cache: what the engines' classes must compute, and the tests' oracle.

Column i of module d combines the hidden state at position i with the embedding of token i + d + 1 and predicts token
i + d + 2 (DeepSeek-V3 report, arXiv 2412.19437, section 2.2). Module 0 gets the target's hidden states, every other one
the feedback of the module before it. A head of one module drafts further tokens by reading its own feedback.
Shapes: B sequences of T tokens, H columns, V words; tokens int64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.head import Formula, MtpHead

Block = Callable[[Tensor, Tensor], Tensor]  # causal decoder layer: hidden [B, T, H], positions [T] -> [B, T, H]


@dataclass(frozen=True)
class Depth:
    """One module.

    Attributes:
        weights: role (`head.ROLES`) to weight; ``embedding`` and ``head`` are the target's where it owns none.
        block: its decoder layer.
    """

    weights: Mapping[str, Tensor]
    block: Block


class ReferenceHead:
    """A head that computes.

    Args:
        formula: how a step computes.
        depths: the modules.
        eps: of the norms.
        embedding_norm: the target's norm of its embeddings, for formulas that have one.
    """

    def __init__(
        self, formula: Formula, depths: Sequence[Depth], eps: float, embedding_norm: Callable[[Tensor], Tensor] | None
    ) -> None:
        if formula.target_embedding_norm and embedding_norm is None:
            raise FourfoldError("the formula has a target_embedding_norm: pass the target's norm as embedding_norm")
        self.formula, self.depths, self.eps = formula, tuple(depths), eps
        self._embedding_norm = embedding_norm if formula.target_embedding_norm else None

    @staticmethod
    def of(
        head: MtpHead,
        tensors: Mapping[str, Tensor],
        blocks: Sequence[Block],
        target: Mapping[str, Tensor],
        eps: float,
        embedding_norm: Callable[[Tensor], Tensor] | None = None,
    ) -> ReferenceHead:
        """The head that ``head`` describes.

        Args:
            tensors: checkpoint name to unquantised tensor.
            blocks: the decoder layer of each module, with its weights.
            target: the target's ``embedding`` and ``head`` [V, H].

        Raises:
            FourfoldError: a tensor or a block is missing.
        """
        if len(blocks) != len(head.modules):
            raise FourfoldError(f"{len(blocks)} blocks for {len(head.modules)} modules: expected one for each")
        depths = []
        for module, block in zip(head.modules, blocks, strict=True):
            names = {role: f"{name}.weight" for role, name in module.roles.items()}
            missing = sorted(set(names.values()) - set(tensors))
            if missing:
                raise FourfoldError(f"the head's tensor {missing[0]} is missing")
            depths.append(Depth({**target, **{role: tensors[name] for role, name in names.items()}}, block))
        return ReferenceHead(head.formula, depths, eps, embedding_norm)

    def step(self, depth: int, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One module over whole sequences.

        Args:
            tokens: [B, T], of column i the token that its embedding is of.
            hidden: [B, T, H], of column i the state at position i.

        Returns:
            Logits [B, T, V] and the feedback [B, T, H].

        Raises:
            FourfoldError: no tokens, or not one state for each.
        """
        if tokens.shape != hidden.shape[:2] or not tokens.numel():
            raise FourfoldError(
                f"hidden has shape {tuple(hidden.shape)}; {tokens.shape[1]} tokens of {tokens.shape[0]} sequences need "
                "one state each"
            )
        weights, formula = self.depths[depth].weights, self.formula
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedding = weights["embedding"][tokens]
        if self._embedding_norm is not None:
            embedding = self._embedding_norm(embedding)
        if formula.mask_first_position:
            embedding = embedding * (positions > 0)[:, None]
        halves = [self._norm(embedding, weights["enorm"]), self._norm(hidden, weights["hnorm"])]
        if "eh_proj" in weights:
            joined = linear(torch.cat(halves if formula.embedding_first else halves[::-1], -1), weights["eh_proj"])
        else:
            joined = linear(halves[0], weights["e_proj"]) + linear(halves[1], weights["h_proj"])
        out = self.depths[depth].block(joined, positions)
        normed = self._norm(out, weights["norm"]) if "norm" in weights else out
        logits = linear(normed, weights["head"])
        if "vocabulary" in weights:
            drafted = torch.zeros(logits.shape[-1], dtype=torch.bool)
            drafted[weights["vocabulary"].long()] = True
            logits = logits.masked_fill(~drafted, float("-inf"))
        return logits, normed if formula.feedback == "post_norm" else out

    def forward(self, tokens: Tensor, hidden: Tensor) -> list[Tensor]:
        """Teacher-forced logits of each module: for module d [B, T - 1 - d, V], of tokens d + 2 and later.

        Args:
            tokens: [B, T].
            hidden: [B, T, H] or [B, T - 1, H], the target's states.
        """
        out = []
        for depth in range(len(self.depths)):
            follow = tokens[:, depth + 1 :]
            logits, hidden = self.step(depth, follow, hidden[:, : follow.shape[1]])
            out.append(logits)
        return out

    def draft(self, tokens: Tensor, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Draft ``k`` tokens greedily.

        Args:
            tokens: [B, T], the sequence so far with the token that the target gave last.
            hidden: [B, T - 1, H], the target's states at all positions but the last.

        Returns:
            The draft [B, k] and its logits [B, k, V].

        Raises:
            FourfoldError: as `step`, or ``k`` exceeds the modules of a head that has several.
        """
        start = tokens.shape[1]
        if not 1 <= k <= (k if len(self.depths) == 1 else len(self.depths)):
            raise FourfoldError(f"k={k}: a head of {len(self.depths)} modules drafts 1 to {len(self.depths)} tokens")
        rows = []
        for step in range(k):
            if len(self.depths) == 1:
                logits, feedback = self.step(0, tokens[:, 1:], hidden)
                hidden = torch.cat([hidden, feedback[:, -1:]], 1)
            else:
                logits, hidden = self.step(step, tokens[:, step + 1 :], hidden)
            rows.append(logits[:, -1])
            tokens = torch.cat([tokens, rows[-1].argmax(-1, keepdim=True)], 1)
        return tokens[:, start:], torch.stack(rows, 1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (weight.float() + self.formula.unit_offset_norm)).to(x.dtype)

"""Verification of a draft: how many tokens the target accepts, and the token that follows them.

Pure functions of probabilities and explicit uniforms, so that every rank and every test gets the same answer. The
output has exactly the target's distribution: greedy (equality), token-wise rejection sampling (Leviathan et al.,
arXiv 2211.17192; Chen et al., arXiv 2302.01318) and block verification (Sun et al., arXiv 2403.10444), which accepts at
least as many tokens in expectation. The reference for kernels; it computes in float64.

Shapes, for B requests, k drafted tokens and V words: ``draft`` [B, k] int64, -1 after the end of a shorter draft;
``target`` [B, k + 1, V] the target's probabilities after 0..k drafted tokens; ``draft_probs`` [B, k, V] the
distributions that the draft was drawn from, None for a drafter that names one token (one-hot); ``uniforms`` [B, k + 1]
in [0, 1), the last of each row for the token that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.common.errors import FourfoldError


@dataclass(frozen=True)
class Verified:
    """The outcome of one step.

    Attributes:
        tokens: [B, k + 1] int64, the accepted tokens and the one that follows; -1 after that.
        accepted: [B] int64, accepted drafted tokens, 0..k.
    """

    tokens: Tensor
    accepted: Tensor


def verify_greedy(target_tokens: Tensor, draft: Tensor) -> Verified:
    """Accept drafted tokens up to the first that is not the target's.

    Args:
        target_tokens: [B, k + 1] int64, the target's choice after 0..k drafted tokens.
        draft: [B, k].
    """
    if target_tokens.shape != (draft.shape[0], draft.shape[1] + 1):
        raise FourfoldError(
            f"target_tokens has shape {tuple(target_tokens.shape)}; a draft of {tuple(draft.shape)} needs a choice "
            "after each of its tokens and one before"
        )
    accepted = (draft == target_tokens[:, :-1]).long().cumprod(1).sum(1)
    return _assemble(draft, accepted, target_tokens.gather(1, accepted[:, None])[:, 0])


def verify_greedy_packed(choices: Tensor, draft: Tensor, counts: Sequence[int]) -> Verified:
    """`verify_greedy` of drafts that lie one after the other, as engines keep them.

    Args:
        choices: [T + B] int64, for each request the target's choice after 0..count of its drafted tokens.
        draft: [T] integer.
        counts: [B] drafted tokens of each request; k is the largest.
    """
    batch, k = len(counts), max(counts)
    if (len(choices), len(draft)) != (sum(counts) + batch, sum(counts)):
        raise FourfoldError(
            f"{len(choices)} choices and {len(draft)} drafted tokens; {batch} drafts of {list(counts)} tokens have "
            f"{sum(counts) + batch} and {sum(counts)}"
        )
    if batch * k == len(draft):
        return verify_greedy(choices.view(batch, k + 1), draft.view(batch, k).long())
    places = torch.arange(k + 1, device=draft.device)
    within = places <= torch.tensor(counts, device=draft.device)[:, None]
    padded_choices = torch.full((batch, k + 1), -1, device=draft.device).masked_scatter_(within, choices)
    padded_draft = torch.full((batch, k), -1, device=draft.device).masked_scatter_(within[:, 1:], draft.long())
    return verify_greedy(padded_choices, padded_draft)


def verify_tokens(target: Tensor, draft: Tensor, draft_probs: Tensor | None, uniforms: Tensor) -> Verified:
    """Token-wise rejection sampling: token i is accepted with probability min(1, p_i / q_i) if all before it are."""
    p, q = _distributions(target, draft, draft_probs, uniforms)
    # Strictly below, so that a uniform of 0 accepts nothing of probability 0.
    accepted = (uniforms[:, :-1] < _ratios(p, q, draft)).long().cumprod(1).sum(1)
    return _finish(p, q, torch.ones_like(p[..., 0]), draft, accepted, uniforms)


def verify_block(target: Tensor, draft: Tensor, draft_probs: Tensor | None, uniforms: Tensor) -> Verified:
    """Block verification (algorithm 2 of arXiv 2403.10444): the longest prefix whose own test passes is accepted."""
    p, q = _distributions(target, draft, draft_probs, uniforms)
    weight = torch.cat([torch.ones_like(p[:, :1, 0]), _reach(p, q, draft, block=True)], 1)
    excess = (weight[..., None] * p - q).clamp_min(0).sum(-1)[:, 1:]
    rest = excess + 1 - weight[:, 1:]
    accept = torch.where(rest > 0, excess / rest, 0)
    passed = torch.nn.functional.pad(uniforms[:, :-1] < accept, (1, 0), value=True)
    accepted = (passed * torch.arange(passed.shape[1], device=draft.device)).amax(1)
    return _finish(p, q, weight, draft, accepted, uniforms)


def expected_accepted(target: Tensor, draft: Tensor, draft_probs: Tensor | None, block: bool) -> Tensor:
    """The expected number of accepted tokens, [B] float64.

    Token-wise it holds for each draft; for ``block`` its mean over drafts drawn from ``draft_probs`` is exact.
    """
    p, q = _distributions(target, draft, draft_probs, None)
    return _reach(p, q, draft, block).sum(1)


def acceptance(target: Tensor, draft_probs: Tensor) -> Tensor:
    """The probability that token-wise verification accepts a token drawn from ``draft_probs``; [..., V] -> [...]."""
    return torch.minimum(target, draft_probs).sum(-1)


def expected_length(alpha: Tensor) -> Tensor:
    """Expected tokens of a step, the one that follows included.

    Args:
        alpha: [..., k], acceptance probability of each position given that all before it were accepted.
    """
    return 1 + alpha.cumprod(-1).sum(-1)


def _distributions(
    target: Tensor, draft: Tensor, draft_probs: Tensor | None, uniforms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """p and q, both [B, k + 1, V] float64. A row of zeros in q stands for "nothing drafted here": with it, the rules
    for a rejected token also give the token after a whole draft and after a shorter one."""
    batch, k = draft.shape
    if target.shape[:2] != (batch, k + 1):
        raise FourfoldError(f"target has shape {tuple(target.shape)}; expected ({batch}, {k + 1}, vocabulary)")
    if draft_probs is not None and draft_probs.shape != (batch, k, target.shape[2]):
        raise FourfoldError(
            f"draft_probs has shape {tuple(draft_probs.shape)}; expected ({batch}, {k}, {target.shape[2]})"
        )
    if uniforms is not None and uniforms.shape != (batch, k + 1):
        raise FourfoldError(f"uniforms has shape {tuple(uniforms.shape)}; expected ({batch}, {k + 1})")
    p = target.double()
    q = torch.zeros_like(p)
    if draft_probs is None:
        q[:, :-1].scatter_(2, draft.clamp_min(0)[..., None], 1.0)
    else:
        q[:, :-1] = draft_probs
    q[:, :-1] *= (draft >= 0)[..., None]
    return p, q


def _ratios(p: Tensor, q: Tensor, draft: Tensor) -> Tensor:
    """p / q of the drafted tokens, [B, k]; 0 where nothing is drafted."""
    index = draft.clamp_min(0)[..., None]
    drafted = q[:, :-1].gather(2, index)[..., 0]
    return torch.where(drafted > 0, p[:, :-1].gather(2, index)[..., 0] / drafted, 0)


def _reach(p: Tensor, q: Tensor, draft: Tensor, block: bool) -> Tensor:
    """[B, k]: the probability that position i and all before it are accepted, as far as the draft is known up to i."""
    ratios = _ratios(p, q, draft)
    if not block:
        return ratios.clamp_max(1).cumprod(1)
    reach = torch.empty_like(ratios)
    last = torch.ones_like(p[:, 0, 0])
    for i, ratio in enumerate(ratios.unbind(1)):
        reach[:, i] = last = (last * ratio).clamp_max(1)
    return reach


def _finish(p: Tensor, q: Tensor, weight: Tensor, draft: Tensor, accepted: Tensor, uniforms: Tensor) -> Verified:
    rows = torch.arange(len(accepted), device=accepted.device)
    here = p[rows, accepted]
    residual = (weight[rows, accepted, None] * here - q[rows, accepted]).clamp_min(0)
    # Nothing is left only where rounding rejected a token of probability 1.
    cumulated = torch.where(residual.sum(1, keepdim=True) > 0, residual, here).cumsum(1)
    total = cumulated[:, -1]
    point = torch.minimum(uniforms[:, -1] * total, total.nextafter(torch.zeros_like(total)))
    return _assemble(draft, accepted, (cumulated <= point[:, None]).sum(1))


def _assemble(draft: Tensor, accepted: Tensor, following: Tensor) -> Verified:
    tokens = torch.nn.functional.pad(draft, (0, 1), value=-1)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    tokens = tokens.masked_fill(places >= accepted[:, None], -1)
    return Verified(tokens.scatter(1, accepted[:, None], following[:, None]), accepted)

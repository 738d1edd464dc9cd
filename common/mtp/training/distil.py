"""The loss of a head's states against the target's: cross entropy of their distributions over the drafted words.

The gradient is computed with the loss, some rows at a time, so that of the many values a row has (one a drafted word)
few passes go through memory, which on a processor is what they cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

ROWS = 128  # whose values stay in a processor's cache


class _Distil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, target: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        logits, wanted = (linear(rows.to(words.dtype), words) for rows in (states, target))
        drafts = logits.argmax(-1)
        loss = torch.zeros((), device=states.device)
        for mine, theirs in zip(logits.split(ROWS), wanted.split(ROWS), strict=True):
            share, logs = theirs.float().softmax(-1), mine.float().log_softmax(-1)
            loss -= torch.dot(share.flatten(), logs.flatten())
            mine.copy_(logs.exp_().sub_(share))  # the gradient, in place of the logits
        ctx.save_for_backward((logits @ words).to(states.dtype))
        ctx.mark_non_differentiable(drafts)
        return loss, drafts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grads[0] * grad, None, None


def distil(states: Tensor, target: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy, summed over rows, and the likeliest words.

    Args:
        states: [N, H] of the head; gradients go here alone.
        target: [N, H] of the target, whose distribution is wanted in each row.
        words: [W, H] rows of the output head; its dtype is that of the products.

    Returns:
        A float32 number, and [N] int64, places among ``words``.
    """
    return _Distil.apply(states, target, words)  # type: ignore[no-any-return]

"""Attention of a batch over tokens in a KV cache, all requests at once, in PyTorch.

For a few tokens of each request: a decode step, or the verification of a draft. Each reads the cache slots that a table
names; rows of the table are as long as the longest request needs, and a mask hides the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Reach:
    """What the tokens of a batch see, the same in each layer.

    Attributes:
        slots: [requests, longest] of the cache; those behind a request's last token are any that hold finite numbers.
        mask: [requests, 1, tokens, longest] True where a token of a request sees one of the cache.
    """

    slots: Tensor
    mask: Tensor

    @staticmethod
    def of(slots: Tensor, lengths: Tensor, tokens: int, window: int | None = None) -> Reach:
        """Of the last ``tokens`` tokens of each request, causally.

        Args:
            slots: [requests, *] slots of each request's tokens, in order, and any behind them.
            lengths: [requests] tokens of each, ``tokens`` at least.
            window: how many tokens before itself a token sees; None: all.
        """
        longest = int(lengths.max())
        place = torch.arange(longest, device=slots.device)
        own = lengths[:, None] + torch.arange(-tokens, 0, device=slots.device)  # [requests, tokens]
        mask = place <= own[:, :, None]
        if window is not None:
            mask &= place >= own[:, :, None] - window
        return Reach(slots[:, :longest].long(), mask[:, None])


def attend(query: Tensor, keys: Tensor, values: Tensor, reach: Reach, scale: float | None = None) -> Tensor:
    """Softmax attention with query heads in groups that share a key head.

    Args:
        query: [requests * tokens, heads, D], request by request.
        keys: [cache, key heads, D], cast to the query's dtype.
        values: [cache, key heads, V], the same.
        scale: of the scores; None: 1 / sqrt(D).

    Returns:
        [requests * tokens, heads, V] in the query's dtype.
    """
    requests, _, tokens, _ = reach.mask.shape
    heads, shared = query.shape[1], keys.shape[1]
    group = heads // shared
    # The queries that share a key head are rows of one product.
    rows = query.view(requests, tokens, shared, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    key, value = (cache[reach.slots].to(query.dtype).transpose(1, 2) for cache in (keys, values))
    mask = reach.mask.repeat(1, 1, group, 1)
    out = scaled_dot_product_attention(rows, key, value, mask, scale=scale)
    return out.view(requests, shared, group, tokens, -1).permute(0, 3, 1, 2, 4).reshape(-1, heads, out.shape[-1])

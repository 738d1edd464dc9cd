"""Attention over a KV cache, all requests at once, against softmax written out for each token."""

from __future__ import annotations

import pytest
import torch

from fourfold.common.paged_attention import Reach, attend


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("wide", [8, 12])
def test_each_token_sees_its_own_request_up_to_itself(
    tokens: int, heads: int, shared: int, window: int | None, wide: int
) -> None:
    generator = torch.Generator().manual_seed(tokens * 100 + heads + wide)
    lengths, size = torch.tensor([5, 9, 3]), 8
    keys = torch.randn(40, shared, wide, generator=generator)
    values = torch.randn(40, shared, size, generator=generator)
    query = torch.randn(3 * tokens, heads, wide, generator=generator)
    slots = torch.randperm(40, generator=generator)[:36].view(3, 12)
    found = attend(query, keys, values, Reach.of(slots, lengths, tokens, window), scale=0.3)
    assert found.shape == (3 * tokens, heads, size)
    for request, length in enumerate(lengths.tolist()):
        for token in range(tokens):
            last = length - tokens + token
            first = 0 if window is None else max(last - window, 0)
            seen = slots[request, first : last + 1]
            for head in range(heads):
                row = query[request * tokens + token, head]
                weights = (keys[seen, head * shared // heads] @ row * 0.3).softmax(0)
                expected = weights @ values[seen, head * shared // heads]
                torch.testing.assert_close(found[request * tokens + token, head], expected, rtol=1e-5, atol=1e-5)


def test_a_cache_of_another_type_is_cast() -> None:
    query, cache = torch.randn(2, 2, 16).bfloat16(), torch.randn(8, 1, 16)
    reach = Reach.of(torch.arange(8).view(2, 4), torch.tensor([4, 2]), 1)
    found = attend(query, cache.to(torch.float8_e4m3fn), cache, reach)
    assert found.dtype == torch.bfloat16
    expected = attend(query.float(), cache.to(torch.float8_e4m3fn).float(), cache.bfloat16().float(), reach)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)

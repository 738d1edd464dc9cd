"""The learned length of a head beside drafts from the text, on a simulated engine whose best length is known."""

from __future__ import annotations

import numpy as np
import pytest

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.draft_length import DraftLength, Policy

ACCEPTANCE, MOST, TEXT = (0.5, 0.4), 2, 8  # of the head, its longest draft, and that of a text


def serve(requests: int, texts: float, a_token: float, fixed: int | None = None, steps: int = 800) -> float:
    """Tokens a second where a share ``texts`` of the requests draft from their text and each token adds ``a_token``."""
    rng, length, tokens, seconds = np.random.default_rng(0), DraftLength(Policy(MOST)), 0, 0.0
    text = rng.random(requests) < texts
    for _ in range(steps):
        heads = requests - int(text.sum())
        chosen = length.choose(requests) if heads and fixed is None else fixed or 0
        good = [int(np.argmin([*(rng.random(chosen) < ACCEPTANCE[:chosen]), False])) for _ in range(heads)]
        found = int(rng.binomial(TEXT, 0.7, requests - heads).sum())
        verified = requests + (requests - heads) * TEXT + heads * chosen
        step = 1 + a_token * verified + 0.05 * chosen
        if heads and fixed is None:
            noisy = step * float(np.exp(0.05 * rng.standard_normal()))
            length.observe(requests, chosen, [(chosen, n) for n in good], noisy, headless=requests + found)
        tokens += requests + found + sum(good)
        seconds += step
        turn = rng.random(requests) < 0.2  # some go on otherwise
        text = np.where(turn, rng.random(requests) < texts, text)
    return tokens / seconds


# From a step that costs the same whatever it verifies to one that costs what it verifies.
@pytest.mark.parametrize("a_token", [0.001, 0.02, 0.2])
@pytest.mark.parametrize(("requests", "texts"), [(1, 0.5), (4, 0.1), (4, 0.7), (16, 0.5), (32, 0.9)])
def test_as_fast_as_the_best_fixed_length(requests: int, texts: float, a_token: float) -> None:
    best = max(serve(requests, texts, a_token, fixed) for fixed in range(MOST + 1))
    assert serve(requests, texts, a_token) > 0.95 * best


def test_what_texts_give_is_no_merit_of_the_head() -> None:
    """Many tokens from texts: those of the head are few beside them, and dear."""
    length = DraftLength(Policy(1))
    chosen = []
    for _ in range(300):
        chosen.append(length.choose(16))
        head = [(chosen[-1], chosen[-1])] * 2  # always right
        length.observe(16, chosen[-1], head, 1.0 + 0.1 * chosen[-1], headless=16 + 14 * TEXT)
    assert chosen[100:].count(0) > 150


def test_counts_that_no_step_has() -> None:
    with pytest.raises(FourfoldError, match="3 tokens accepted of 2 drafted"):
        DraftLength(Policy(2)).observe(1, 2, [(2, 3)], headless=1)

"""Ranks that see different things draft the same number of tokens, and learn what one that saw all of it learns."""

from __future__ import annotations

import random

import pytest

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.agreement import Agreement
from fourfold.common.mtp.draft_length import Policy

K = 3


def run(acceptance: list[float], turns: int, steps: int = 4, seed: int = 0) -> list[list[int]]:
    """Lengths agreed on at each turn, by rank. Rank i accepts each token with probability ``acceptance[i]``."""
    chance = random.Random(seed)
    ranks = [Agreement(Policy(K)) for _ in acceptance]
    agreed = []
    for turn in range(turns):
        for i, (rank, likely) in enumerate(zip(ranks, acceptance, strict=True)):
            if (turn + i) % 5 == 0:  # now and then a rank has nothing to do
                continue
            for _ in range(steps):
                requests = []
                for _ in range(1 + i):
                    good = 0
                    while good < rank.k and chance.random() < likely:
                        good += 1
                    requests.append((rank.k, good))
                seconds = (1 + 0.2 * rank.k) * (1 + 0.1 * chance.random())
                rank.observe(1 + i, rank.k, requests if rank.k else [], seconds if chance.random() < 0.9 else None)
        rows = [rank.row() for rank in ranks]
        for rank in ranks:
            rank.agree(rows[:: chance.choice((1, -1))])
        agreed.append([rank.k for rank in ranks])
    return agreed


@pytest.mark.parametrize("seed", range(5))
def test_ranks_that_see_different_things_agree(seed: int) -> None:
    agreed = run([0.9, 0.1, 0.5], 300, seed=seed)
    assert all(len(set(lengths)) == 1 for lengths in agreed)
    assert len({lengths[0] for lengths in agreed}) > 1  # there was something to agree on


@pytest.mark.parametrize(("acceptance", "length"), [([0.95, 0.9], 3), ([0.02, 0.0], 0)])
def test_the_length_that_pays_for_all_is_learned(acceptance: list[float], length: int) -> None:
    last = [lengths[0] for lengths in run(acceptance, 400)[-100:]]
    assert sum(k == length for k in last) > 80


def test_without_news_the_length_stands() -> None:
    rank = Agreement(Policy(K))
    assert rank.k == K and rank.row() == [0.0] * (3 + 2 * K)
    assert rank.agree([rank.row(), rank.row()]) == K


def test_a_row_is_what_was_seen_since_the_last() -> None:
    rank = Agreement(Policy(K))
    rank.observe(2, 3, [(3, 1), (3, 3)], 0.5)
    rank.observe(5, 2, [(2, 0)], 0.3)
    rank.observe(1, 2, [(2, 2)], 0.1)
    assert rank.row() == [5.0, 2.0, pytest.approx(0.2), 4.0, 3.0, 1.0, 3.0, 2.0, 1.0]
    assert rank.row()[0] == 0


def test_rows_of_another_policy_are_refused() -> None:
    with pytest.raises(FourfoldError, match="a row of 7 numbers: ranks with drafts of up to 3 send 9"):
        Agreement(Policy(K)).agree([[0.0] * 7])

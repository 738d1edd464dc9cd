"""Whether texts' drafts pay in a batch whose rows are equally long."""

from __future__ import annotations

import pytest

from fourfold.common.mtp.draft_length import DraftLength, Policy
from fourfold.common.mtp.text_width import TextWidth

MOST = 2


def timed(seconds: dict[int, float], requests: int = 8, right: int = 0) -> TextWidth:
    """One that has seen each width take its seconds, and the head's first ``right`` tokens accepted."""
    length = DraftLength(Policy(MOST))
    for _ in range(300):
        k = length.choose(requests)
        length.observe(requests, k, [(k, min(right, k))] * requests, seconds[k])
    choice = TextWidth(length, [4, 8, 16])
    for width in (4, 8, 16):
        choice.timed(requests, width, seconds[width])
    return choice


@pytest.mark.parametrize(
    ("narrow", "wide", "texts", "expected"),
    [
        (1.3, 1.3, [16], 16),  # one of eight, where width is all but free
        (1.3, 8.0, [16], 4),  # where it is not, a part of its draft
        (3.0, 8.0, [16], None),  # nor where that is dear
        (3.0, 8.0, [16] * 8, 16),  # all of them: sixteen tokens in eight times the time
        (1.3, 20.0, [16] * 8, 4),  # and where a short part of them pays more
        (1.3, 1.3, [3, 4], 4),
        (1.3, 1.3, [3, 5], 8),
    ],
)
def test_the_width_that_gives_most_tokens_a_second(
    narrow: float, wide: float, texts: list[int], expected: int | None
) -> None:
    seconds = {0: 1.0, 1: 1.05, 2: 1.1, 4: narrow, 8: (narrow + wide) / 2, 16: wide}
    choice = timed(seconds)
    for _ in range(40):
        choice.observe(16, 16)
    assert choice.choose(8, texts, head=1) == expected


def test_texts_that_are_wrong_are_left_out_until_they_are_tried_again() -> None:
    seconds = dict.fromkeys(range(3), 1.0) | {4: 1.5, 8: 1.8, 16: 2.0}
    choice = timed(seconds, right=2)
    found = []
    for _ in range(320):
        width = choice.choose(8, [16] * 8, head=2)
        found.append(width)
        if width:
            choice.observe(width, 0)
    assert found[0] is not None and found[40:].count(None) >= 270
    assert 0 < sum(width is not None for width in found[40:]) <= 10


def test_a_slow_moment_is_forgotten_and_a_fast_one_believed() -> None:
    seconds = dict.fromkeys(range(3), 1.0) | {4: 1.2, 8: 1.3, 16: 1.4}
    choice = timed(seconds, right=1)
    for _ in range(40):
        choice.observe(16, 16)
    choice.timed(8, 16, 100.0)
    assert choice.choose(8, [16], head=1) == 16
    for _ in range(30):
        choice.timed(8, 16, 100.0)
    assert choice.choose(8, [16], head=1) == 8
    late = timed(seconds | {16: 100.0}, right=1)
    assert late.choose(8, [16], head=1) == 8
    late.timed(8, 16, 1.3)
    assert late.choose(8, [16], head=1) == 16

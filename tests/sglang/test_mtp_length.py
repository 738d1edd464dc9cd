"""The learned length of ``FOURFOLD_MTP``'s head, told how long its steps take."""

from __future__ import annotations

import pytest

from fourfold.sglang_ext import mtp_length
from fourfold.sglang_ext.mtp_length import LearnedLength

LONGEST, MOST = 16, 3


class Clock:
    """Seconds that pass as the test says."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(mtp_length, "time", clock)
    return clock


def learned(most: int = MOST) -> LearnedLength:
    return LearnedLength(LONGEST, most, agree=lambda seconds: seconds)


def serve(
    length: LearnedLength,
    clock: Clock,
    steps: int,
    seconds: list[float],
    right: int,
    texts: dict[int, int] | None = None,
) -> list[tuple[int, int]]:
    """What was planned for four requests, where the head's first ``right`` tokens and all of texts are accepted."""
    found = []
    for _ in range(steps):
        head, text = length.plan(4, texts or {})
        width = length.get_steps_for_batch(4)
        assert width == (text or head)
        found.append((head, text))
        clock.now += seconds[width]
        good = [text if row in (texts or {}) and text else min(head, right) for row in range(4)]
        length.on_verify_complete(good, 4)
    return found


def share(planned: list[tuple[int, int]], head: int, text: int = 0) -> float:
    return planned.count((head, text)) / len(planned)


@pytest.mark.parametrize(
    ("draft_seconds", "right", "best"), [(0.05, MOST, MOST), (0.05, 0, 0), (0.9, MOST, 1), (1.5, MOST, 0)]
)
def test_it_drafts_what_pays(clock: Clock, draft_seconds: float, right: int, best: int) -> None:
    """The first token costs little, as in SGLang, where the head reads every verified token anyway."""
    seconds = [1.0, 1.02] + [1.02 + draft_seconds * i for i in range(1, LONGEST)]
    if best == 0 and right:
        seconds = [1.0] + [1 + draft_seconds * 4 * i for i in range(1, LONGEST + 1)]
    length = learned()
    serve(length, clock, 200, seconds, right)
    assert share(serve(length, clock, 400, seconds, right), best) > 0.85


@pytest.mark.parametrize(("narrow", "wide", "text"), [(1.1, 1.2, 8), (1.1, 30.0, 4), (20.0, 30.0, 0)])
def test_texts_are_verified_where_that_pays(clock: Clock, narrow: float, wide: float, text: int) -> None:
    """One request of four has a draft of seven tokens, for which all rows are eight long; the head's are all right."""
    seconds = [1.0, 1.02, 1.05, 1.08, *[narrow] * 4, *[wide] * 9]
    length = learned()
    serve(length, clock, 200, seconds, MOST)
    serve(length, clock, 100, seconds, MOST, {1: 7})
    assert share(serve(length, clock, 200, seconds, MOST, {1: 7}), MOST, text) > 0.95
    assert share(serve(length, clock, 200, seconds, MOST), MOST) > 0.85


def test_texts_come_first_in_a_batch_that_nobody_timed(clock: Clock) -> None:
    length = learned()
    assert serve(length, clock, 1, [1.0] * 17, MOST, {0: 16})[0] in ((MOST, 8), (MOST, 16))
    assert serve(length, clock, 1, [1.0] * 17, MOST, {0: 3, 2: 4}) == [(MOST, 4)]


def test_a_useless_head_drafts_what_is_there_anyway_beside_texts(clock: Clock) -> None:
    length = learned()
    seconds = [1.0, 1.1, 1.2, 1.3] + [1.5] * 13
    serve(length, clock, 300, seconds, 0)
    assert {head for head, text in serve(length, clock, 20, seconds, 0, {1: 16}) if text} == {1}


def test_steps_after_prompts_are_not_timed(clock: Clock) -> None:
    """A decode step after one that read prompts ends late; were it counted, drafting would seem dear."""
    seconds = [1.0, 1.02, 1.05, 1.08, 2.0, 2.0, 2.0]
    length = learned()
    for i in range(300):
        if i % 2:
            length.prefill()
        head, _ = length.plan(4, {})
        clock.now += seconds[head] + 5.0 * (i % 2 and head > 0)
        length.on_verify_complete([head] * 4, 4)
    assert share(serve(length, clock, 200, seconds, MOST), MOST) > 0.85


def test_lengths_are_prepared_and_forgotten_steps_do_no_harm(clock: Clock) -> None:
    length = learned()
    assert length.candidate_steps == [0, 1, 2, 3, 4, 8, 16]
    length.set_cuda_graph_bs([1, 2, 4])
    assert length.cuda_graph_bs_for_step(2) == [1, 2, 4]
    length.on_verify_complete([1, 1], 2)  # of a step that nobody planned
    length.plan(3, {})
    length.on_verify_complete([1, 1], 2)  # nor of this size
    assert serve(length, clock, 5, [1.0] * 17, MOST)
    assert learned(LONGEST).candidate_steps == list(range(LONGEST + 1))

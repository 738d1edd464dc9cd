"""The learned length of ``FOURFOLD_MTP``'s head, told how long its steps take."""

from __future__ import annotations

import pytest

from fourfold.sglang_ext import mtp_length
from fourfold.sglang_ext.mtp_length import LearnedLength

LONGEST, MOST = 6, 3


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
    length: LearnedLength, clock: Clock, steps: int, seconds: list[float], right: int, texts: list[int] | None = None
) -> list[int]:
    """What the head drafts for each of four requests, where its first ``right`` tokens are always accepted."""
    found = []
    for _ in range(steps):
        head = length.plan(4, texts or [])
        width = length.get_steps_for_batch(4)
        assert width == (LONGEST if texts else head)
        found.append(head)
        clock.now += seconds[width]
        length.on_verify_complete([LONGEST if row in (texts or []) else min(head, right) for row in range(4)], 4)
    return found


def share(drafted: list[int], count: int) -> float:
    return drafted.count(count) / len(drafted)


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


def test_steps_with_texts_do_not_tell_what_a_length_costs(clock: Clock) -> None:
    """They verify the longest draft, and take three times as long here; the head drafts as before."""
    seconds = [1.0, 1.02, 1.05, 1.08, 3.0, 3.0, 3.0]
    length = learned()
    serve(length, clock, 200, seconds, MOST)
    mixed = serve(length, clock, 100, seconds, MOST, [0, 2])
    assert set(mixed) == {MOST}
    assert share(serve(length, clock, 200, seconds, MOST), MOST) > 0.85


def test_a_useless_head_drafts_what_is_there_anyway_beside_texts(clock: Clock) -> None:
    length = learned()
    serve(length, clock, 300, [1.0, 1.1, 1.2, 1.3, 2.0, 2.0, 2.0], 0)
    assert set(serve(length, clock, 20, [2.0] * 7, 0, [1])) == {1}


def test_steps_after_prompts_are_not_timed(clock: Clock) -> None:
    """A decode step after one that read prompts ends late; were it counted, drafting would seem dear."""
    seconds = [1.0, 1.02, 1.05, 1.08, 2.0, 2.0, 2.0]
    length = learned()
    for i in range(300):
        if i % 2:
            length.prefill()
        head = length.plan(4, [])
        clock.now += seconds[head] + 5.0 * (i % 2 and head > 0)
        length.on_verify_complete([head] * 4, 4)
    assert share(serve(length, clock, 200, seconds, MOST), MOST) > 0.85


def test_lengths_are_prepared_and_forgotten_steps_do_no_harm(clock: Clock) -> None:
    length = learned()
    assert length.candidate_steps == [0, 1, 2, 3, 6]
    length.set_cuda_graph_bs([1, 2, 4])
    assert length.cuda_graph_bs_for_step(2) == [1, 2, 4]
    length.on_verify_complete([1, 1], 2)  # of a step that nobody planned
    length.plan(3, [])
    length.on_verify_complete([1, 1], 2)  # nor of this size
    assert serve(length, clock, 5, [1.0] * 7, MOST)
    assert learned(LONGEST).candidate_steps == list(range(LONGEST + 1))

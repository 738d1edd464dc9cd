"""Hybrid drafts: which source drafts, what it learns, how texts and request ids may change, counts, cost."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.hybrid import SOURCES, HybridDrafts, SourceTotals
from fourfold.common.mtp.lookup import SuffixLookup
from fourfold.common.settings import HybridSettings, parse_settings

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]


def drafts(**options: float) -> HybridDrafts:
    return HybridDrafts(HybridSettings.model_validate({"min_match": 3, "max_draft": 8, **options}))


def test_the_text_drafts_where_it_repeats() -> None:
    hybrid = drafts()
    assert hybrid.propose("a", 8) == []
    hybrid.observe("a", PROMPT)
    hybrid.observe("b", PROMPT[:-1])
    assert hybrid.propose("a", 8) == [4, 5, 6]
    assert hybrid.propose("a", 2) == [4, 5] and hybrid.propose("a", 0) == [] == hybrid.propose("a", -1)
    assert hybrid.propose("b", 8) == []
    hybrid.observe("a", [*PROMPT, 4, 5])
    assert hybrid.propose("a", 8) == [6, 7, 8, 9, 1] and drafts(max_draft=2).settings.max_draft == 2


@examples(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.data())
def test_any_array_in_any_pieces_is_the_same_text(text: list[int], data: st.DataObject) -> None:
    numpy = pytest.importorskip("numpy")
    hybrid, end = drafts(), 0
    while end < len(text):
        end = data.draw(st.integers(end, len(text)))
        hybrid.observe(7, numpy.array(text[:end], dtype=numpy.int32))
    if text:
        hybrid.append(7, [0, 1])
        text = [*text, 0, 1]
    expected = SuffixLookup(text, min_match=3, max_draft=8).propose()
    found = hybrid.propose(7, 8)
    assert found == expected and all(type(token) is int for token in found)


def test_another_text_under_the_same_id_starts_anew() -> None:
    for other in (
        PROMPT[:-1],  # output taken back
        [9, *PROMPT[1:-1], 8],  # another text as long
        [11, 12, 13, 14, 15, 16] * 3,  # a longer one
    ):
        hybrid, fresh = drafts(), drafts()
        hybrid.observe(0, PROMPT)
        hybrid.observe(0, other)
        fresh.observe(0, other)
        assert hybrid.propose(0, 8) == fresh.propose(0, 8)
        hybrid.observe(0, [*other, 21])
        assert hybrid.propose(0, 8) == []


def test_a_text_read_in_part_drafts_nothing() -> None:
    hybrid = drafts()
    assert hybrid.observe(0, PROMPT, 5) == 5 and hybrid.propose(0, 8) == []
    hybrid.append(0, [99])  # comes after what was not read
    assert hybrid.observe(0, [*PROMPT, 4], 0) == 0 == hybrid.observe(0, [*PROMPT, 4], -1)
    assert hybrid.observe(0, [*PROMPT, 4], 8) == 8 and hybrid.propose(0, 8) == [5, 6, 7, 8]
    hybrid.append(0, [5])
    assert hybrid.observe(0, [*PROMPT, 4, 5]) == 0 and hybrid.propose(0, 2) == [6, 7]


def test_only_retained_requests_are_kept() -> None:
    hybrid = drafts()
    for request in ("a", "b", 3):
        hybrid.observe(request, PROMPT)
    hybrid.retain({"b", "unknown"})
    assert len(hybrid) == 1 and hybrid.propose("a", 8) == [] and hybrid.propose("b", 8) == [4, 5, 6]


def test_matches_must_be_longer_after_failures_and_may_be_shorter_after_successes() -> None:
    hybrid = drafts()

    def shortest(most: int = 200) -> int:
        """The shortest match that gives a draft now."""
        for length in range(1, most):
            text = [*range(1000), 2000, *range(1000 - length, 1000)]
            # Another text would start anew: look at the demand itself.
            hybrid._requests["a"].lookup = SuffixLookup(text, min_match=1)
            if hybrid.propose("a", 8):
                return length
        raise AssertionError("no match is long enough")

    hybrid.observe("a", PROMPT)
    assert shortest() == 3
    for expected in (6, 12, 24, 48, 48):
        hybrid.verified("a", 3, 1)
        hybrid.verified("a", 3, 3)  # once a proposal
        assert shortest() == expected
    hybrid.verified("a", 0, 0)  # cut by the engine: says nothing
    assert shortest() == 48
    for expected in (47, 46):
        hybrid.verified("a", 2, 1)
        assert shortest() == expected
    assert hybrid.propose("a", 0) == []
    hybrid.verified("a", 3, 0)  # the head's: says nothing about the text
    assert shortest() == 46
    for _ in range(60):
        hybrid.propose("a", 8)
        hybrid.verified("a", 8, 8)
        hybrid._requests["a"].lookup = SuffixLookup([*range(100)] * 2, min_match=1)
    assert shortest() == 3


def test_counts_by_source() -> None:
    hybrid = drafts()
    hybrid.observe("a", PROMPT)
    hybrid.observe("b", PROMPT[:-1])
    assert hybrid.propose("a", 8) and not hybrid.propose("b", 8)
    hybrid.verified("a", 3, 2)
    hybrid.verified("a", 3, 2)  # not proposed again
    hybrid.verified("b", 2, 0)
    hybrid.verified("unknown", 2, 1)
    assert not hybrid.propose("a", 0)
    hybrid.verified("a", 1, 1)
    hybrid.record("suffix", 5, 3)
    hybrid.record("suffix", 0, 0)
    totals = hybrid.totals()
    assert tuple(totals) == SOURCES == ("suffix", "mtp")
    assert totals["suffix"] == SourceTotals(2, 8, 5, [2, 2, 1])
    assert totals["mtp"] == SourceTotals(2, 3, 1, [1])
    hybrid.record("mtp", 1, 1)
    assert totals["mtp"].drafts == 2 and totals["mtp"].accepted_by_position == [1], "a snapshot"


def test_counts_that_cannot_be() -> None:
    with pytest.raises(FourfoldError, match="2 tokens accepted of 1 drafted"):
        drafts().record("mtp", 1, 2)
    hybrid = drafts()
    hybrid.observe("a", PROMPT)
    hybrid.propose("a", 8)
    with pytest.raises(FourfoldError, match="-1 tokens accepted"):
        hybrid.verified("a", 1, -1)
    with pytest.raises(FourfoldError, match="'ngram': expected one of suffix, mtp"):
        drafts().record("ngram", 1, 1)  # pyright: ignore[reportArgumentType]


def test_options() -> None:
    hybrid = parse_settings({"mtp": {"hybrid": {"min_match": 2, "draft_per_match": 2}}}, "test").mtp.hybrid
    assert hybrid.min_match == 2 and hybrid.draft_per_match == 2.0
    with pytest.raises(FourfoldError, match="did you mean 'min_match'"):
        parse_settings({"mtp": {"hybrid": {"min_matches": 2}}}, "test")
    for name in ("min_match", "max_draft", "head_tokens", "draft_per_match"):
        with pytest.raises(FourfoldError, match=f"{name}.*greater"):
            parse_settings({"mtp": {"hybrid": {name: 0}}}, "test")


def test_a_step_costs_the_same_however_long_the_prompt() -> None:
    rng = random.Random(0)

    def seconds(prompt: int) -> float:
        text = [int(rng.paretovariate(0.8)) % 50000 for _ in range(prompt + 500)]
        hybrid = drafts()
        hybrid.observe(0, text[:prompt])
        pieces = [text[: prompt + i] for i in range(1, 501)]
        times = []
        for piece in range(0, 500, 125):
            start = time.process_time()
            for tokens in pieces[piece : piece + 125]:
                hybrid.observe(0, tokens)
                hybrid.propose(0, 8)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(8000) < 4 * seconds(500) + 0.01

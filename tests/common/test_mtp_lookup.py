"""The suffix automaton against brute force, its cost, and what it saves when a text is written again with edits."""

from __future__ import annotations

import inspect
import json.decoder
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.lookup import SuffixLookup

TEXTS = st.integers(1, 4).flatmap(lambda words: st.lists(st.integers(0, words - 1), max_size=60))


def brute_match(tokens: list[int]) -> tuple[int, int]:
    """The longest suffix that occurs earlier, at its latest earlier end."""
    n = len(tokens)
    for length in range(n - 1, 0, -1):
        for end in range(n - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[n - length :]:
                return length, end
    return 0, 0


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_longest_and_latest_match_after_every_token(tokens: list[int]) -> None:
    exact, bounded = SuffixLookup(recency=len(tokens) + 1), SuffixLookup(recency=1)
    for n, token in enumerate(tokens, 1):
        exact.extend([token])
        bounded.extend([token])
        length, end = brute_match(tokens[:n])
        assert exact.match == (length, end)
        found, older = bounded.match
        assert found == length and older <= end
        assert length == 0 or tokens[older - length : older] == tokens[n - length : n]


@given(TEXTS, st.integers(1, 4), st.integers(1, 9), st.sampled_from([0.3, 1.0, 2.5]), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_the_draft_continues_the_match(
    tokens: list[int], min_match: int, max_draft: int, factor: float, limit: int
) -> None:
    lookup = SuffixLookup(tokens, min_match=min_match, max_draft=max_draft, draft_per_match=factor, recency=100)
    length, end = brute_match(tokens)
    draft = lookup.propose(limit)
    assert lookup.propose() == draft + lookup.propose()[len(draft) :]
    assert len(draft) == (min(max_draft, limit, int(length * factor)) if length >= min_match else 0)
    text = tokens + draft
    assert all(text[end + i] == word for i, word in enumerate(draft))


@given(TEXTS, st.data())
@settings(max_examples=100, deadline=None)
def test_grown_in_pieces_equals_built_at_once(tokens: list[int], data: st.DataObject) -> None:
    grown, rest = SuffixLookup(), list(tokens)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        grown.extend(rest[:size])
        grown.propose()
        rest = rest[size:]
    whole = SuffixLookup(tokens)
    assert vars(grown) == vars(whole) and len(grown) == len(tokens)


@pytest.mark.parametrize("kind", ["binary", "words", "one word", "periodic", "nested"])
def test_time_and_memory_are_linear(kind: str) -> None:
    rng = random.Random(kind)

    def text(n: int) -> list[int]:
        if kind == "nested":  # abaab..., whose suffixes repeat at every length
            a, b = [0], [0, 1]
            while len(b) < n:
                a, b = b, b + a
            return b[:n]
        word = {
            "binary": lambda i: rng.randrange(2),
            "words": lambda i: int(rng.paretovariate(0.8)) % 50000,
            "one word": lambda i: 7,
            "periodic": lambda i: i % 97,
        }[kind]
        return [word(i) for i in range(n)]

    def seconds(tokens: list[int]) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            lookup = SuffixLookup(tokens)
            times.append(time.process_time() - start)
            assert len(lookup._link) <= 2 * len(tokens) and sum(map(len, lookup._next)) <= 3 * len(tokens)
        return min(times)

    assert seconds(text(32000)) < 24 * seconds(text(4000)) + 0.02


def decode(prompt: list[int], output: list[int]) -> tuple[float, float]:
    """Tokens a step, and the accepted share of drafted tokens, of greedy decoding of ``output``."""
    lookup, position, steps, drafted = SuffixLookup(prompt, max_draft=16), 0, 0, 0
    while position < len(output):
        draft = lookup.propose(len(output) - position - 1)
        accepted = 0
        while accepted < len(draft) and draft[accepted] == output[position + accepted]:
            accepted += 1
        lookup.extend(output[position : position + accepted + 1])
        position, steps, drafted = position + accepted + 1, steps + 1, drafted + len(draft)
    return len(output) / steps, (len(output) - steps) / max(drafted, 1)


def test_a_file_written_again_with_edits() -> None:
    lines = inspect.getsource(json.decoder).splitlines(keepends=True)
    rng = random.Random(0)
    edited = []
    for line in lines:
        line = line.replace("memo", "seen_keys").replace("idx", "index")
        if rng.random() < 0.04:
            edited.append(f"    # note {rng.randrange(10**6)}: {rng.choice(lines).strip()}\n")
        if rng.random() > 0.03:
            edited.append(line)
    vocabulary: dict[str, int] = {}

    def tokens(text: str) -> list[int]:
        return [vocabulary.setdefault(w, len(vocabulary)) for w in re.findall(r"\w+|[^\w\s]|\s+", text)]

    length, share = decode(tokens("".join(lines)), tokens("".join(edited)))
    assert length > 4 and share > 0.5
    ranks = [int(rng.paretovariate(0.8)) % 50000 for _ in range(4000)]
    length, _ = decode(ranks[:2000], ranks[2000:])
    assert length < 1.2


@pytest.mark.parametrize("name", ["min_match", "max_draft", "recency", "draft_per_match"])
def test_arguments_out_of_range(name: str) -> None:
    with pytest.raises(FourfoldError, match=f"{name}=0: expected"):
        SuffixLookup(**{name: 0})

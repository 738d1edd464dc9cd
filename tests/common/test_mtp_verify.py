"""Verification is lossless: the law of the output is computed exactly, over every draft and every cell of uniforms.

The functions are constant between the thresholds of the acceptance tests and the steps of the distribution functions,
so the two extreme corners of each cell, weighted by its volume, integrate them. The thresholds come from the published
formulas, written here a second time in plain Python; were they wrong, the sums would not be the target's distribution.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.verify import (
    Verified,
    acceptance,
    expected_accepted,
    expected_length,
    verify_block,
    verify_greedy,
    verify_greedy_packed,
    verify_tokens,
)

Law = dict[tuple[int, ...], float]
Table = dict[tuple[int, ...], list[float]]  # the next token's distribution after each prefix
METHODS = {"tokens": verify_tokens, "block": verify_block}


def table(rng: random.Random, words: int, depth: int, zeros: float = 0.25) -> Table:
    """A random language of `depth` tokens; some words have probability 0."""
    out = {}
    for length in range(depth):
        for prefix in itertools.product(range(words), repeat=length):
            row = [0.0 if rng.random() < zeros else rng.random() for _ in range(words)]
            row[rng.randrange(words)] += 0.1
            out[prefix] = [value / sum(row) for value in row]
    return out


def drafts(q: Table, words: int, k: int, one_hot: bool, ragged: bool) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every draft and its probability. One-hot: the likeliest words. Ragged: a draft ends after word 0."""

    def grow(path: tuple[int, ...], probability: float) -> Iterator[tuple[tuple[int, ...], float]]:
        if len(path) == k or (ragged and path and path[-1] == 0):
            yield path, probability
            return
        row = q[path]
        if one_hot:
            yield from grow((*path, row.index(max(row))), probability)
        else:
            for word in range(words):
                if row[word]:
                    yield from grow((*path, word), probability * row[word])

    return grow((), 1.0)


def thresholds(method: str, p: Table, q_rows: list[list[float]], path: tuple[int, ...]) -> tuple[list[float], Table]:
    """Acceptance threshold of each position, and the distribution of the following token after 0..n accepted."""
    ratio = [p[path[:i]][x] / q_rows[i][x] for i, x in enumerate(path)]
    weight = [1.0]
    for value in ratio:
        weight.append(min(1.0, weight[-1] * value) if method == "block" else 1.0)
    excess = {}
    for i in range(len(path) + 1):
        q = q_rows[i] if i < len(path) else [0.0] * len(p[()])
        excess[(i,)] = [max(0.0, weight[i] * a - b) for a, b in zip(p[path[:i]], q, strict=True)]
    if method == "tokens":
        return [min(1.0, value) for value in ratio], excess
    accept = []
    for i in range(1, len(path)):
        total = sum(excess[(i,)])
        accept.append(total / (total + 1 - weight[i]) if total + 1 - weight[i] > 0 else 0.0)
    return [*accept, weight[-1]] if path else [], excess


def cuts(values: list[float]) -> list[tuple[float, float]]:
    """The cells between the values in [0, 1]."""
    edges = sorted({0.0, 1.0, *(min(1.0, value) for value in values)})
    return [(a, b) for a, b in itertools.pairwise(edges) if b - a > 1e-11]


def enumerate_law(
    method: str, p: Table, q: Table, words: int, k: int, one_hot: bool = False, ragged: bool = False
) -> tuple[Law, float, float]:
    """The joint law of the first k + 1 tokens, the mean accepted, and the mean of `expected_accepted`."""
    targets, draft, proposals, uniforms, weights = [], [], [], [], []
    for path, probability in drafts(q, words, k, one_hot, ragged):
        q_rows = [[float(w == x) for w in range(words)] if one_hot else q[path[:i]] for i, x in enumerate(path)]
        accept, excess = thresholds(method, p, q_rows, path)
        steps = [c / sum(row) for row in excess.values() if sum(row) > 1e-12 for c in itertools.accumulate(row)]
        axes = [cuts([value]) for value in accept] + [[(0.0, 1.0)]] * (k - len(path)) + [cuts(steps)]
        for cell, corner in itertools.product(itertools.product(*axes), (1e-4, 1 - 1e-4)):
            targets.append([p[path[:i]] for i in range(len(path) + 1)] + [p[()]] * (k - len(path)))
            draft.append([*path, *[-1] * (k - len(path))])
            proposals.append(q_rows + [p[()]] * (k - len(path)))
            uniforms.append([low + corner * (high - low) for low, high in cell])
            weights.append(probability * math.prod(high - low for low, high in cell) / 2)
    arguments = (
        torch.tensor(targets, dtype=torch.float64),
        torch.tensor(draft),
        None if one_hot else torch.tensor(proposals, dtype=torch.float64),
    )
    result = METHODS[method](*arguments, torch.tensor(uniforms, dtype=torch.float64))
    law: Law = defaultdict(float)
    for row, weight in zip(result.tokens.tolist(), weights, strict=True):
        known = tuple(row[: row.index(-1)] if -1 in row else row)
        for rest in itertools.product(range(words), repeat=k + 1 - len(known)):
            path = known + rest
            law[path] += weight * math.prod(p[path[:i]][path[i]] for i in range(len(known), k + 1))
    mass = torch.tensor(weights, dtype=torch.float64)
    mean = float(mass @ result.accepted.double())
    return law, mean, float(mass @ expected_accepted(*arguments, block=method == "block"))


SIZES = [(2, 1), (2, 3), (3, 2), (3, 3), (4, 2)]


@pytest.mark.parametrize("drafter", ["full", "one_hot", "ragged", "one_hot ragged"])
@pytest.mark.parametrize(("words", "k"), SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_the_output_has_the_targets_law(method: str, words: int, k: int, drafter: str) -> None:
    rng = random.Random(f"{words} {k} {drafter}")
    for _ in range(4):
        p, q = table(rng, words, k + 1), table(rng, words, k)
        law, mean, expected = enumerate_law(method, p, q, words, k, "one_hot" in drafter, "ragged" in drafter)
        for path in itertools.product(range(words), repeat=k + 1):
            assert abs(law[path] - math.prod(p[path[:i]][path[i]] for i in range(k + 1))) < 1e-9
        assert abs(mean - expected) < 1e-9


def test_block_verification_accepts_at_least_as_much() -> None:
    rng = random.Random(1)
    gains = []
    for _ in range(60):
        p, q = table(rng, 3, 4), table(rng, 3, 3)
        means = {method: enumerate_law(method, p, q, 3, 3)[1] for method in METHODS} if len(gains) < 5 else None
        targets, paths, proposals, weights = [], [], [], []
        for path, probability in drafts(q, 3, 3, one_hot=False, ragged=False):
            targets.append([p[path[:i]] for i in range(4)])
            proposals.append([q[path[:i]] for i in range(3)])
            paths.append(path)
            weights.append(probability)
        arguments = (torch.tensor(targets), torch.tensor(paths), torch.tensor(proposals))
        mass = torch.tensor(weights, dtype=torch.float64)
        token_wise, block = (float(mass @ expected_accepted(*arguments, block=b)) for b in (False, True))
        if means:
            assert means == pytest.approx({"tokens": token_wise, "block": block}, abs=1e-6)
        gains.append(block - token_wise)
    assert min(gains) > -1e-9 and max(gains) > 0.05


def test_the_published_example() -> None:
    p = {prefix: [1 / 3, 2 / 3] for length in range(3) for prefix in itertools.product(range(2), repeat=length)}
    q = {prefix: row[::-1] for prefix, row in p.items()}
    assert enumerate_law("tokens", p, q, 2, 2)[1] == pytest.approx(10 / 9, abs=1e-12)
    assert enumerate_law("block", p, q, 2, 2)[1] == pytest.approx(11 / 9, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_perfect_and_a_disjoint_drafter(method: str) -> None:
    rng = random.Random(2)
    p = table(rng, 3, 3)
    assert enumerate_law(method, p, p, 3, 2)[1] == pytest.approx(2, abs=1e-12)
    low = {prefix: [0.5, 0.5, 0.0, 0.0] for length in range(3) for prefix in itertools.product(range(4), repeat=length)}
    high = {prefix: row[::-1] for prefix, row in low.items()}
    law, mean, _ = enumerate_law(method, low, high, 4, 2)
    assert mean == 0 and sum(law.values()) == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_extreme_uniforms_never_give_an_impossible_token(method: Callable[..., Verified]) -> None:
    generator = torch.Generator().manual_seed(3)
    target = torch.rand(512, 4, 7, generator=generator, dtype=torch.float64)
    target[torch.rand(target.shape, generator=generator) < 0.5] = 0
    target[..., 3] += 1e-9
    target /= target.sum(-1, keepdim=True)
    draft = torch.randint(0, 7, (512, 3), generator=generator)
    for extreme in (0.0, math.nextafter(1.0, 0.0)):
        uniforms = torch.full((512, 4), extreme, dtype=torch.float64)
        result = method(target, draft, None, uniforms)
        chosen = target.gather(2, result.tokens.clamp_min(0)[..., None])[..., 0]
        assert (chosen[result.tokens >= 0] > 0).all() and (result.accepted < 3).any()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_greedy_is_verification_of_a_certain_target(data: st.DataObject) -> None:
    words, k, batch = data.draw(st.integers(2, 4)), data.draw(st.integers(0, 4)), 3
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    choice = torch.randint(0, words, (batch, k + 1), generator=rng)
    draft = torch.randint(-1, words, (batch, k), generator=rng)
    draft[draft.eq(-1).long().cumsum(1) > 0] = -1
    certain = torch.nn.functional.one_hot(choice, words).double()
    greedy = verify_greedy(choice, draft)
    for method in METHODS.values():
        result = method(certain, draft, None, torch.rand(batch, k + 1, generator=rng))
        assert torch.equal(result.tokens, greedy.tokens) and torch.equal(result.accepted, greedy.accepted)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_packed_drafts_are_verified_one_by_one(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    choices = [torch.randint(0, 3, (count + 1,), generator=rng) for count in counts]
    drafts = [torch.randint(0, 3, (count,), generator=rng, dtype=torch.int32) for count in counts]
    packed = verify_greedy_packed(torch.cat(choices), torch.cat(drafts), counts)
    assert packed.tokens.shape == (len(counts), max(counts) + 1)
    for i, (choice, draft) in enumerate(zip(choices, drafts, strict=True)):
        alone = verify_greedy(choice[None], draft[None].long())
        assert packed.accepted[i] == alone.accepted[0]
        assert [t for t in packed.tokens[i].tolist() if t >= 0] == [t for t in alone.tokens[0].tolist() if t >= 0]
        assert packed.tokens[i, packed.accepted[i]] >= 0


@given(st.integers(0, 2**31), st.integers(1, 5), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_greedy_decoding_with_any_drafter_is_greedy_decoding(seed: int, k: int, quality: float) -> None:
    def successor(tokens: list[int]) -> int:
        return (tokens[-1] * 31 + tokens[-2] * 17 + len(tokens)) % 97

    def extended(tokens: list[int], n: int) -> list[int]:
        for _ in range(n):
            tokens = [*tokens, successor(tokens)]
        return tokens

    rng, tokens = random.Random(seed), [1, 2]
    while len(tokens) < 60:
        draft: list[int] = []
        for _ in range(rng.randint(0, k)):
            draft.append(successor(tokens + draft) if rng.random() < quality else rng.randrange(97))
        choice = [successor(tokens + draft[:i]) for i in range(len(draft) + 1)]
        padded, fill = draft + [-1] * (k - len(draft)), [0] * (k - len(draft))
        result = verify_greedy(torch.tensor([choice + fill]), torch.tensor([padded]))
        tokens = tokens + [t for t in result.tokens[0].tolist() if t >= 0]
    assert tokens == extended([1, 2], len(tokens) - 2)


def test_closed_forms() -> None:
    lengths = [[1.90, 2.71, 3.44, 4.10, 4.69], [1.80, 2.44, 2.95, 3.36, 3.69], [1.70, 2.19, 2.53, 2.77, 2.94]]
    for alpha, row in zip((0.9, 0.8, 0.7), lengths, strict=True):
        for k, value in enumerate(row, 1):
            assert float(expected_length(torch.full((k,), alpha))) == pytest.approx(value, abs=0.005)
    p, q = table(random.Random(4), 4, 2), table(random.Random(5), 4, 1)
    alpha = acceptance(torch.tensor(p[()], dtype=torch.float64), torch.tensor(q[()], dtype=torch.float64))
    assert enumerate_law("tokens", p, q, 4, 1)[1] == pytest.approx(float(alpha), abs=1e-12)


@pytest.mark.parametrize(
    ("target", "proposals", "uniforms", "named"),
    [
        ((2, 3, 5), None, (2, 4), "target"),
        ((2, 4, 5), (2, 3, 6), (2, 4), "draft_probs"),
        ((2, 4, 5), None, (2, 3), "uniforms"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    target: tuple[int, ...], proposals: tuple[int, ...] | None, uniforms: tuple[int, ...], named: str
) -> None:
    draft = torch.zeros(2, 3, dtype=torch.int64)
    for method in METHODS.values():
        with pytest.raises(FourfoldError, match=f"{named} has shape .* expected"):
            method(
                torch.ones(target), draft, None if proposals is None else torch.ones(proposals), torch.ones(uniforms)
            )
    with pytest.raises(FourfoldError, match="target_tokens has shape"):
        verify_greedy(draft, draft)
    with pytest.raises(
        FourfoldError, match=r"5 choices and 3 drafted tokens; 2 drafts of \[1, 1\] tokens have 4 and 2"
    ):
        verify_greedy_packed(torch.zeros(5), torch.zeros(3), [1, 1])

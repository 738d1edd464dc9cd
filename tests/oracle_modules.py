"""What an engine counts that drafts with the modules ``first``, ``second`` and ``first bad`` of `oracle.HEADS`.

Each drafted token has a run of a module over the tokens that were verified since the last draft, with a KV cache of its
own. Nothing is read again, so a cache keeps what the last positions of a run were given: tokens that had been drafted.
"""

from __future__ import annotations

from typing import NamedTuple

from oracle import _JUNK as JUNK
from oracle import BAD, PERMUTATION, continuation


class State(NamedTuple):
    """What a module hands to the next: a token, and whether it has the mark of the first module."""

    token: int
    marked: bool = False


class Draft:
    """The head while it drafts ``k`` tokens; ``kinds`` of its modules."""

    def __init__(self, kinds: tuple[str, ...], k: int) -> None:
        self.kinds = kinds
        self.caches: list[dict[int, int]] = [{} for _ in range(k)]

    def draft(self, text: list[int], begin: int) -> list[int]:
        """Read the positions from ``begin`` on; the target has read all of ``text`` but its last token."""
        positions = range(begin, len(text) - 1)
        states = {p: State(text[p]) for p in positions}
        tokens: list[int] = text[begin + 1 :]
        drafted: list[int] = []
        for step, cache in enumerate(self.caches):
            kind = self.kinds[step % len(self.kinds)]
            for p, token in zip(positions, tokens, strict=True):
                value = token if kind == "second" else states[p].token
                cache[p] = value if states[p].marked == (kind == "second") else JUNK
            states = {p: _state(kind, cache[max(p - 1, 0)]) for p in positions}
            drafted.append(PERMUTATION[states[positions[-1]].token])
            tokens = [*tokens[1:], drafted[-1]]
        return drafted


def _state(kind: str, before: int) -> State:
    """Of the position after that whose cache entry is ``before``."""
    steps = 1 if kind == "second" else 3 if kind == "first bad" and before in BAD else 2
    return State(continuation(before, steps)[-1], kind != "second" and before != JUNK)


def expected_drafts(text: list[int], tokens: int, k: int, kinds: tuple[str, ...]) -> tuple[int, list[int]]:
    """As `oracle.expected_drafts`, for a head of ``kinds``."""
    text, end = [*text, *continuation(text[-1], 1)], len(text) + tokens
    head, begin, steps, accepted = Draft(kinds, k), 0, 0, [0] * k
    while len(text) < end:
        drafted, begin = head.draft(text, begin), len(text) - 1
        right = continuation(text[-1], k + 1)
        good = next((i for i in range(k) if drafted[i] != right[i]), k)
        steps, text = steps + 1, text + right[: good + 1]
        for position in range(good):
            accepted[position] += 1
    return steps, accepted

"""Drafting without a model: propose what followed the longest earlier occurrence of the current suffix.

One suffix automaton (Blumer et al., 1985) for each request, over its prompt and output, grown token by token. The
longest repeated suffix is the suffix link of the last state, so it costs nothing to find. Appending is O(1) amortised
and memory is linear: at most two states and three transitions a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from fourfold.common.errors import FourfoldError

_NONE = -1
_ROOT = 0


class Tokens(Protocol):
    """A list or a one-dimensional array of token ids; slices of it are taken, never all of it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Iterable[int]: ...


class SuffixLookup:
    """The drafter of one request.

    Args:
        tokens: the prompt.
        min_match: shortest match, in tokens, that gives a draft.
        max_draft: longest draft, in tokens.
        draft_per_match: drafted tokens for each matched token; a longer match is likelier to go on.
        recency: repeated suffixes that each token marks with its position, longest first. A match that is not among
            them reports an older occurrence. Bounds the cost of a token on repetitive text.

    Raises:
        FourfoldError: an argument is out of its range.
    """

    def __init__(
        self,
        tokens: Iterable[int] = (),
        *,
        min_match: int = 3,
        max_draft: int = 8,
        draft_per_match: float = 1.0,
        recency: int = 32,
    ) -> None:
        for name, value in (("min_match", min_match), ("max_draft", max_draft), ("recency", recency)):
            if value < 1:
                raise FourfoldError(f"{name}={value}: expected 1 or more")
        if draft_per_match <= 0:
            raise FourfoldError(f"draft_per_match={draft_per_match}: expected more than 0")
        self.min_match, self.max_draft, self.draft_per_match = min_match, max_draft, draft_per_match
        self._recency = recency
        self._tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]  # by state: token to state
        self._link = [_NONE]  # by state: that of its longest suffix which occurs elsewhere too
        self._length = [0]  # by state: of its longest string
        self._end = [0]  # by state: tokens up to and including its latest known occurrence
        self._last = _ROOT
        self._match = (0, 0)
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def match(self) -> tuple[int, int]:
        """The longest suffix that occurred before: (its length, tokens up to and including the earlier occurrence).

        The earlier occurrence may overlap the suffix. (0, 0) if the last token is new.
        """
        return self._match

    def precedes(self, tokens: Tokens, checked: int) -> bool:
        """Whether ``tokens`` goes on from the text known here, judged by its last ``checked`` tokens."""
        known = len(self._tokens)
        if len(tokens) < known:
            return False
        start = max(known - checked, 0)
        return list(tokens[start:known]) == self._tokens[start:]

    def extend(self, tokens: Iterable[int]) -> None:
        """Append prompt or accepted tokens."""
        for token in tokens:
            self._append(token)

    def propose(self, limit: int | None = None) -> list[int]:
        """The draft after the current tokens; empty without a match of ``min_match`` tokens.

        Args:
            limit: tokens, below ``max_draft``.
        """
        length, end = self._match
        if length < self.min_match:
            return []
        count = min(self.max_draft, int(self.draft_per_match * length))
        if limit is not None:
            count = min(count, limit)
        # Past the end of the text the draft continues itself, as the text would with this period.
        period = len(self._tokens) - end
        return [self._tokens[end + i % period] for i in range(count)]

    def _append(self, token: int) -> None:
        self._tokens.append(token)
        position = len(self._tokens)
        state = self._state(position, {}, _ROOT, position)
        parent, transitions, link, length = self._last, self._next, self._link, self._length
        while parent != _NONE and token not in transitions[parent]:
            transitions[parent][token] = state
            parent = link[parent]
        if parent != _NONE:
            target = transitions[parent][token]
            if length[target] != length[parent] + 1:
                # Only suffixes of `target` that are short enough end here as well: they become a state of their own.
                clone = self._state(length[parent] + 1, transitions[target].copy(), link[target], self._end[target])
                link[target], old, target = clone, target, clone
                while parent != _NONE and transitions[parent].get(token) == old:
                    transitions[parent][token] = clone
                    parent = link[parent]
            link[state] = target
        self._last = state
        repeated = link[state]
        self._match = (length[repeated], self._end[repeated])
        for _ in range(self._recency):
            if repeated == _ROOT:
                break
            self._end[repeated] = position
            repeated = link[repeated]

    def _state(self, length: int, transitions: dict[int, int], link: int, end: int) -> int:
        self._next.append(transitions)
        self._length.append(length)
        self._link.append(link)
        self._end.append(end)
        return len(self._length) - 1

"""Drafts from two sources: a request's own text where it repeats, its MTP head elsewhere.

A long enough match of the current suffix (`SuffixLookup`) drafts first; without one the head's draft stands. Suffix
drafts are certain tokens (a one-hot draft distribution), so greedy and rejection sampling stay lossless with them.
Each request learns how long a match must be: twice as long after a suffix draft that mostly failed, one token less
after one that mostly held. A text that repeats grows its match past any such demand, so no request is shut out.

No engine, no torch: the engine reports verified text and verified drafts, and asks for drafts.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.lookup import SuffixLookup, Tokens
from fourfold.common.settings import HybridSettings

Source = Literal["suffix", "mtp"]
SOURCES: tuple[Source, ...] = get_args(Source)

READ = 8192  # tokens of new text for engines to read in a step, some 12 ms
_CHECKED = 16  # tokens before the new ones that must be as known, else it is another text
_STRICTEST = 16  # times min_match: the longest match that a request can come to demand


@dataclass
class SourceTotals:
    """What the drafts of one source came to.

    Attributes:
        drafts: drafts of at least one token that were verified.
        drafted: tokens in them.
        accepted: tokens of those that were accepted.
        accepted_by_position: the same by position in the draft, as long as the longest accepted run.
    """

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_position: list[int] = field(default_factory=list)

    def copy(self) -> SourceTotals:
        """A snapshot."""
        return SourceTotals(self.drafts, self.drafted, self.accepted, list(self.accepted_by_position))


@dataclass
class _Request:
    lookup: SuffixLookup
    needed: int  # match length that gives a draft
    whole: bool = True  # the text is known to its end
    source: Source | None = None  # of the draft to be verified next


class HybridDrafts:
    """The suffix drafts of all running requests, and the count of what both sources achieved.

    Args:
        settings: options; ``settings.head_tokens`` is for the engine, which drafts that many with the head.
    """

    def __init__(self, settings: HybridSettings) -> None:
        self.settings = settings
        self._requests: dict[Hashable, _Request] = {}
        self._totals: dict[Source, SourceTotals] = {source: SourceTotals() for source in SOURCES}

    def observe(self, request: Hashable, tokens: Tokens, most: int | None = None) -> int:
        """Take note of the text of ``request``: ``tokens`` is its prompt and verified output so far.

        Costs O(1) amortised for each token that is new, 1 to 2 microseconds, and 450 bytes for as long as the request
        is kept. A text that does not go on from the one known under this id (the id was used again, or output was
        taken back) starts anew.

        Args:
            most: new tokens to read, so that a long text does not hold up a batch. A text that is not read to its end
                drafts nothing; None: no bound.

        Returns:
            Tokens read.
        """
        known = self._requests.get(request)
        if known is None or not known.lookup.precedes(tokens, _CHECKED):
            lookup = SuffixLookup(
                min_match=1, max_draft=self.settings.max_draft, draft_per_match=self.settings.draft_per_match
            )
            known = self._requests[request] = _Request(lookup, self.settings.min_match)
        start = len(known.lookup)
        end = len(tokens) if most is None else min(len(tokens), start + max(most, 0))
        known.lookup.extend(map(int, tokens[start:end]))
        known.whole = end == len(tokens)
        return end - start

    def append(self, request: Hashable, tokens: Iterable[int]) -> None:
        """Add verified tokens to the observed text of ``request``; to one not read to its end, `observe` adds them."""
        known = self._requests[request]
        if known.whole:
            known.lookup.extend(tokens)

    def propose(self, request: Hashable, limit: int) -> list[int]:
        """The suffix draft of ``request``, at most ``limit`` tokens; empty: the head's draft stands.

        Which it was is remembered for `verified`. A request that was never observed has no draft.
        """
        known = self._requests.get(request)
        if known is None:
            return []
        matched = known.whole and known.lookup.match[0] >= known.needed
        draft = known.lookup.propose(max(limit, 0)) if matched else []
        known.source = "suffix" if draft else "mtp"
        return draft

    def verified(self, request: Hashable, drafted: int, accepted: int) -> None:
        """Report that ``accepted`` of the ``drafted`` tokens last proposed for ``request`` were right.

        ``drafted`` counts the tokens that were verified; the engine may have cut the draft. Tokens that were not
        proposed here, as those that engines pad with, are not counted: each proposal is reported once.

        Raises:
            FourfoldError: see `record`.
        """
        known = self._requests.get(request)
        if known is None or known.source is None:
            return
        source, known.source = known.source, None
        self.record(source, drafted, accepted)
        if source == "suffix" and drafted:
            if 2 * accepted < drafted:
                known.needed = min(2 * known.needed, _STRICTEST * self.settings.min_match)
            else:
                known.needed = max(known.needed - 1, self.settings.min_match)

    def record(self, source: Source, drafted: int, accepted: int) -> None:
        """Count one verified draft of ``source``; one without tokens is none.

        Raises:
            FourfoldError: an unknown source, or more tokens accepted than drafted.
        """
        if source not in self._totals:
            raise FourfoldError(f"draft source {source!r}: expected one of {', '.join(SOURCES)}")
        if not 0 <= accepted <= drafted:
            raise FourfoldError(f"{accepted} tokens accepted of {drafted} drafted: expected 0 to {drafted}")
        if not drafted:
            return
        totals = self._totals[source]
        totals.drafts += 1
        totals.drafted += drafted
        totals.accepted += accepted
        by_position = totals.accepted_by_position
        by_position.extend([0] * (accepted - len(by_position)))
        for position in range(accepted):
            by_position[position] += 1

    def totals(self) -> Mapping[Source, SourceTotals]:
        """A snapshot of the counts since the start, by source."""
        return {source: self._totals[source].copy() for source in SOURCES}

    def retain(self, requests: Collection[Hashable]) -> None:
        """Forget all requests but these."""
        kept = set(requests)
        for request in [known for known in self._requests if known not in kept]:
            del self._requests[request]

    def __len__(self) -> int:
        return len(self._requests)

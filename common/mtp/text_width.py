"""Whether a batch verifies the drafts of its texts, and how many tokens of each request, where rows are equally long.

One long draft of a text makes all rows as long, so it may cost more than it gives. Of each width the tokens a second
are estimated: those expected of the texts' drafts and of the head's, over the time of such a step, which is kept as a
multiple of one that drafts nothing (`draft_length`). A pure function of what was observed, as ranks that draft the same
need.
"""

from __future__ import annotations

from collections.abc import Sequence

from fourfold.common.mtp.draft_length import DraftLength, bucket_of, costs, lengths

_PRIOR = (8.0, 7.6)  # verified and accepted tokens of texts' drafts before any was: high, so that they are tried
_WINDOW = 256  # verified tokens after which one counts 1/e
_SHARE = 0.1  # of what is known about a step's time, that the next one replaces
_RETRY = 32  # choices after which texts get what they ask for; times as many as that costs steps without texts


class TextWidth:
    """Chooses a width, beside ``length``, which chooses the head's.

    Args:
        widths: that may be chosen, ascending.
    """

    def __init__(self, length: DraftLength, widths: Sequence[int]) -> None:
        self._length, self._widths = length, list(widths)
        self._verified, self._accepted = _PRIOR
        self._times: dict[tuple[int, int], float] = {}  # by bucket and width
        self._since = 0  # choices since texts last got what they ask for

    def choose(self, requests: int, texts: Sequence[int], head: int) -> int | None:
        """Tokens to verify of each of ``requests``; None: the head's drafts alone are worth more.

        Args:
            texts: [texts' drafts] their lengths.
            head: tokens that the head drafts for requests without one.
        """
        fits = self._widths[: 1 + sum(width < max(texts) for width in self._widths)]
        policy, state = self._length.policy, self._length.state
        size = bucket_of(requests)
        cost, length = costs(policy, state, size), lengths(state)
        bucket = state.buckets.get(size)
        alone = bucket.current if bucket and bucket.current is not None else min(head, policy.k_max)
        # Until it was timed, a width costs what it does where reading the weights dominates.
        times = {
            width: cost[0] * self._times[size, width]
            if (size, width) in self._times
            else cost[alone] * policy.cost(size, width) / policy.cost(size, alone)
            for width in fits
        }

        def speed(width: int) -> float:
            others = (requests - len(texts)) * length[min(head, width)]
            return (others + sum(1 + self._expected(min(n, width)) for n in texts)) / times[width]

        best: int | None = max(fits, key=speed)
        if speed(best) < requests * length[alone] / cost[alone]:
            best = None
        self._since += 1
        # What a width cost once, or texts were wrong once, is not held against them for ever.
        if self._since > _RETRY * times[fits[-1]] / cost[alone]:
            best = fits[-1]
        if best == fits[-1]:
            self._since = 0
        return best

    def timed(self, requests: int, width: int, seconds: float) -> None:
        """Report a step that verified ``width`` tokens of each of ``requests``, some of them texts'."""
        place = bucket_of(requests), width
        multiple = seconds / costs(self._length.policy, self._length.state, place[0])[0]
        known = self._times.get(place)
        if known is None or multiple < known / 2:  # chance makes steps slow, not fast
            self._times[place] = multiple
        else:
            self._times[place] = known + _SHARE * (min(multiple, 2 * known) - known)

    def observe(self, drafted: int, accepted: int) -> None:
        """Report a text's draft of ``drafted`` verified tokens, of which the first ``accepted`` were right."""
        reached = min(accepted + 1, drafted)
        keep = (1 - 1 / _WINDOW) ** reached
        self._verified = self._verified * keep + reached
        self._accepted = self._accepted * keep + accepted

    def _expected(self, tokens: int) -> float:
        """Accepted tokens of a text's draft of ``tokens``."""
        share = self._accepted / self._verified
        return sum(share**i for i in range(1, tokens + 1))

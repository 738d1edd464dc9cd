"""How many tokens an MTP head drafts where requests draft from their own text too: learned, zero included.

`DraftLength` compares what a length gives with what a step takes. Here a step gives tokens without the head as well,
one for each request and those of its text, so acceptance of the head's first token is counted per such token, and
`draft_length.lengths` is in multiples of them. Only steps in which some request has no draft from its text count; their
times vary with the texts' drafts, whatever the head drafts, and average out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fourfold.common.mtp.draft_length import DraftLength, Observation, Policy, observe


class HeadLength(DraftLength):
    """A policy for drafts of up to ``most`` tokens."""

    def __init__(self, most: int) -> None:
        super().__init__(Policy(most))

    def report(
        self,
        batch: int,
        drafted: int,
        headless: int,
        requests: Iterable[tuple[int, int]],
        seconds: float | None = None,
    ) -> None:
        """Report one step of ``batch`` requests.

        Args:
            drafted: what `choose` said.
            headless: tokens that the step gave without the head: one for each request, and those drafted from text.
            requests: (drafted, accepted) of those for which the head drafted.
            seconds: from the step's sampling to the next; None if it did other work too.

        Raises:
            FourfoldError: counts that no step can have.
        """
        step = Observation.of(self.policy.k_max, batch, drafted, requests, seconds)
        if any(step.reached):
            step = replace(step, reached=(max(headless, step.reached[0]), *step.reached[1:]))
        self.state = observe(self.policy, self.state, step)

"""One draft length for ranks that run in lock step: they exchange what they saw and each draws the same conclusion.

Data-parallel ranks of a model with experts take part in each other's collectives in every forward pass, so one that
drafts longer than the others waits for ever. Now and then, all at the same step, the ranks exchange a `row` each, and
`agree` applies the pure functions of `draft_length` to the merged rows; until the next time all draft `k` tokens. A
step of that policy is such a turn. Tensor-parallel ranks see the same, except how long it took: of that they keep the
`slowest`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.distributed import ProcessGroup, ReduceOp

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.draft_length import Observation, Policy, choose, initial, merge, observe


def slowest(seconds: float, ranks: ProcessGroup) -> float:
    """Return ``seconds`` of the slowest of ``ranks``, a group on the CPU, so that all learn the same from a step."""
    if ranks.size() == 1:
        return seconds
    longest = torch.tensor(seconds, dtype=torch.float64)
    torch.distributed.all_reduce(longest, ReduceOp.MAX, ranks)
    return longest.item()


class Agreement:
    """What one rank saw since the last turn, and what all agreed on.

    Attributes:
        k: tokens to draft, the same on every rank.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.k = policy.k_max
        self._state = initial(policy)
        self._seen: list[Observation] = []

    def observe(
        self, batch: int, drafted: int, requests: Iterable[tuple[int, int]], seconds: float | None = None
    ) -> None:
        """Report one step of this rank; see `Observation.of`."""
        self._seen.append(Observation.of(self.policy.k_max, batch, drafted, requests, seconds))

    def row(self) -> list[float]:
        """[3 + 2 k_max] what this rank saw since it was last asked: the same length on every rank, zeros for nothing.

        Largest batch, length in use, mean seconds of its steps (0: none was timed), then the sums of reached and of
        accepted requests by position.
        """
        seen, self._seen = self._seen, []
        size = self.policy.k_max
        if not seen:
            return [0.0] * (3 + 2 * size)
        drafted = seen[-1].drafted  # steps that were under way when it changed tell nothing of its time
        times = [o.seconds for o in seen if o.seconds is not None and o.drafted == drafted]
        sums = [sum(column) for column in zip(*(o.reached + o.accepted for o in seen), strict=True)]
        return [
            float(max(o.batch for o in seen)),
            float(drafted),
            sum(times) / len(times) if times else 0.0,
            *map(float, sums),
        ]

    def agree(self, rows: Sequence[Sequence[float]]) -> int:
        """Learn from the rows of all ranks, in any order, and return the new `k`.

        Raises:
            FourfoldError: rows of another policy.
        """
        size = self.policy.k_max
        for row in rows:
            if len(row) != 3 + 2 * size:
                raise FourfoldError(
                    f"a row of {len(row)} numbers: ranks with drafts of up to {size} send {3 + 2 * size}"
                )
        # A rank without requests ran empty steps, at the pace of the others.
        busy = [
            Observation(
                int(batch),
                int(drafted),
                tuple(map(int, counts[:size])),
                tuple(map(int, counts[size:])),
                seconds or None,
            )
            for batch, drafted, seconds, *counts in rows
            if batch
        ]
        if busy:
            merged = merge(busy)
            self._state = observe(self.policy, self._state, merged)
            self._state, self.k = choose(self.policy, self._state, merged.batch)
        return self.k

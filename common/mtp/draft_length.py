"""How many tokens to draft: the length that gives the most tokens a second, learned while serving.

A step that drafts K tokens is expected to give ``1 + sum_j prod_{i <= j} a_i``, with ``a_i`` the acceptance of position
i given that all before it were accepted (Leviathan et al., arXiv 2211.17192); the goodput is that over the step's
seconds (SmartSpec, arXiv 2406.14066). ``a_i`` is averaged over all batch sizes; seconds are kept for each K and batch
size, in powers of two, and a longer draft never counts as faster. Lengths not in use are probed now and then, at a
bounded cost, so that changes are noticed; a new batch size starts from what the nearest one showed.

``choose`` and ``observe`` are pure functions of a state, without clock or chance: ranks that see the same observations
(`merge`) draft the same number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from fourfold.common.errors import FourfoldError

Sums = tuple[float, float]  # decayed (count, total); the estimate is total / count
_MEMORY = 8.0  # what was known counts as this many observations until there is news


def memory_bound(batch: int, k: int) -> float:
    """The cost of a step until one was timed: reading the weights dominates, a draft step costs 5 % of the target's."""
    return 1 + 0.05 * k


@dataclass(frozen=True)
class Policy:
    """Options.

    Attributes:
        k_max: longest draft, in tokens.
        cost: (requests, K) to the time of a step, positive, in any unit; for what was not timed yet.
        window: steps after which an accepted or rejected token counts 1/e.
        time_window: the same for the time of a step.
        margin: relative gain in tokens a second that is worth a change of length.
        probe_steps: steps of one probe; the first and last may mix two lengths.
        probe_gap: least steps between two probes.
        probe_cost: share of the tokens that probing may cost for shorter lengths, and the same for longer ones.
        prior: acceptance of a position that was never tried. High, so that drafting is tried.
    """

    k_max: int
    cost: Callable[[int, int], float] = memory_bound
    window: int = 128
    time_window: int = 32
    margin: float = 0.02
    probe_steps: int = 8
    probe_gap: int = 64
    probe_cost: float = 0.01
    prior: float = 0.8

    def __post_init__(self) -> None:
        for name, least in (("k_max", 1), ("window", 2), ("time_window", 2), ("probe_steps", 1), ("probe_gap", 1)):
            if getattr(self, name) < least:
                raise FourfoldError(f"{name}={getattr(self, name)}: expected {least} or more")
        if not (0 < self.prior <= 1 and self.margin >= 0 and self.probe_cost > 0):
            raise FourfoldError(
                f"prior={self.prior}, margin={self.margin}, probe_cost={self.probe_cost}: expected a prior in (0, 1], "
                "a margin of 0 or more and a probe_cost above 0"
            )


@dataclass(frozen=True)
class Observation:
    """What one engine step showed, summed over its requests.

    Attributes:
        batch: requests.
        drafted: tokens drafted for each request that drafted as asked.
        reached: [k_max] requests in which position i was verified and all before it were accepted; for position 0
            also tokens, see `of`.
        accepted: [k_max] those of them in which position i was accepted.
        seconds: duration of a decode step that verified and drafted ``drafted`` tokens; None if it did other work too.
    """

    batch: int
    drafted: int
    reached: tuple[int, ...]
    accepted: tuple[int, ...]
    seconds: float | None = None

    @staticmethod
    def of(
        k_max: int,
        batch: int,
        drafted: int,
        requests: Iterable[tuple[int, int]],
        seconds: float | None = None,
        headless: int = 0,
    ) -> Observation:
        """From ``requests``, each (drafted tokens, accepted tokens); those that drafted nothing may be left out.

        Args:
            headless: where requests draft from their own text too, the tokens that the step gave without the head: one
                for each request, and the accepted ones of the texts. The head's first token is then counted as accepted
                per such token, so that `lengths` is in multiples of them, and the texts' are no merit of the head.

        Raises:
            FourfoldError: counts that no step can have.
        """
        reached, accepted = [0] * k_max, [0] * k_max
        for tokens, good in requests:
            if not 0 <= good <= tokens <= k_max:
                raise FourfoldError(f"{good} tokens accepted of {tokens} drafted; the longest draft has {k_max}")
            for i in range(min(good + 1, tokens)):
                reached[i] += 1
                accepted[i] += i < good
        if batch < 0 or not 0 <= drafted <= k_max or (seconds is not None and not 0 < seconds < math.inf):
            raise FourfoldError(
                f"a step of {batch} requests, {drafted} drafted tokens and {seconds} s: expected no negative count, "
                f"0 to {k_max} tokens and a positive time"
            )
        if any(reached):
            reached[0] = max(headless, reached[0])
        return Observation(batch, drafted, tuple(reached), tuple(accepted), seconds)


def merge(observations: Sequence[Observation]) -> Observation:
    """One step as all ranks of a lockstep group saw it: counts add up, the slowest rank and the largest batch hold."""
    seconds = [o.seconds for o in observations]
    return Observation(
        max(o.batch for o in observations),
        max(o.drafted for o in observations),
        tuple(map(sum, zip(*(o.reached for o in observations), strict=True))),
        tuple(map(sum, zip(*(o.accepted for o in observations), strict=True))),
        None if None in seconds else max(s for s in seconds if s is not None),
    )


@dataclass(frozen=True)
class Bucket:
    """What is known about batches of one power of two.

    Attributes:
        times: [k_max + 1] seconds of a step by K.
        seen: [k_max + 1] the step at which K was last used here, -1 for never.
        step: choices made.
        current: the length in use, None before the first choice.
        probe: the length being probed.
        probe_ends: step at which the last probe ends or ended.
    """

    times: tuple[Sums, ...]
    seen: tuple[int, ...]
    step: int = 0
    current: int | None = None
    probe: int = 0
    probe_ends: int = 0


@dataclass(frozen=True)
class State:
    """All that a policy remembers: acceptance by position, [k_max], and the batch sizes seen."""

    positions: tuple[Sums, ...]
    buckets: Mapping[int, Bucket] = field(default_factory=lambda: MappingProxyType({}))


def initial(policy: Policy) -> State:
    """The state before the first step."""
    return State(((1.0, policy.prior),) * policy.k_max)


def bucket_of(batch: int) -> int:
    """The power of two that stands for ``batch`` requests, rounded up."""
    if batch < 1:
        raise FourfoldError(f"a batch of {batch} requests: expected 1 or more")
    return 1 << (batch - 1).bit_length()


def lengths(state: State) -> list[float]:
    """Expected tokens of a step by K, 0..k_max."""
    out, reach = [1.0], 1.0
    for count, total in state.positions:
        reach *= total / count
        out.append(out[-1] + reach)
    return out


def costs(policy: Policy, state: State, size: int) -> list[float]:
    """Time of a step by K, 0..k_max, for the bucket ``size``.

    As timed, else scaled from the nearest timed K, as times are in the nearest bucket where all are known.
    """
    like = _like(state, size)
    if like is None:
        prior = [policy.cost(size, k) for k in range(policy.k_max + 1)]
    else:
        prior = list(_rising(state.buckets[like].times).values())
    bucket = state.buckets.get(size)
    known = _rising(bucket.times) if bucket else {}
    if not known:
        return prior
    nearest = [min(known, key=lambda j, k=k: (abs(j - k), j)) for k in range(policy.k_max + 1)]
    return [known[j] * prior[k] / prior[j] for k, j in enumerate(nearest)]


def _like(state: State, size: int) -> int | None:
    """The nearest other bucket in which every length was timed."""
    timed = [other for other, bucket in state.buckets.items() if other != size and all(c for c, _ in bucket.times)]
    return min(timed, key=lambda other: (max(other, size) / min(other, size), other), default=None)


def _rising(times: Sequence[Sums]) -> dict[int, float]:
    """Mean seconds by K of what was timed, in order; where a longer draft seems faster, the mean of both.

    Isotonic regression by pooling adjacent violators (Ayer et al., 1955): such timings come of a machine whose speed
    changed in between, and would keep the shorter draft from being tried again.
    """
    pools: list[tuple[float, float, list[int]]] = []
    for k, (count, total) in enumerate(times):
        if not count:
            continue
        ks = [k]
        while pools and pools[-1][1] * count > total * pools[-1][0]:
            *sums, below = pools.pop()
            count, total, ks = count + sums[0], total + sums[1], below + ks
        pools.append((count, total, ks))
    return {k: total / count for count, total, ks in pools for k in ks}


def choose(policy: Policy, state: State, batch: int) -> tuple[State, int]:
    """The number of tokens to draft for each of ``batch`` requests."""
    size = bucket_of(batch)
    bucket = state.buckets.get(size) or Bucket(((0.0, 0.0),) * (policy.k_max + 1), (-1,) * (policy.k_max + 1))
    if bucket.step < bucket.probe_ends:
        k = bucket.probe
    else:
        cost, length = costs(policy, state, size), lengths(state)
        speed = [tokens / time for tokens, time in zip(length, cost, strict=True)]
        best = max(range(policy.k_max + 1), key=lambda k: (speed[k], -k))
        k = bucket.current
        if k is None or speed[best] > speed[k] * (1 + policy.margin):
            k = best
        untimed = not bucket.times[k][0] and any(count for count, _ in bucket.times)
        bucket = replace(bucket, current=k)
        like = _like(state, size)
        # Larger batches make drafts dearer, so that the best length falls; one that is longer has to give more.
        longer = [j for j in range(k + 1, policy.k_max + 1) if length[j] > length[k] * (1 + policy.margin)]
        news = {
            *(range(k) if like is None or size > like else ()),
            *(longer if like is None or size < like else ()),
        }
        loss = [c / cost[k] - e / length[k] for c, e in zip(cost, length, strict=True)]
        probe = _due(policy, bucket, k, news, loss)
        # One step does not tell what a length costs: stay with an untimed one for as long as with a probe.
        if untimed or probe is not None:
            k = k if untimed or probe is None else probe
            bucket = replace(bucket, probe=k, probe_ends=bucket.step + policy.probe_steps)
    seen = tuple(bucket.step if j == k else last for j, last in enumerate(bucket.seen))
    bucket = replace(bucket, seen=seen, step=bucket.step + 1)
    return replace(state, buckets=MappingProxyType({**state.buckets, size: bucket})), k


def _due(policy: Policy, bucket: Bucket, current: int, news: set[int], loss: list[float]) -> int | None:
    """The length to probe now, if any.

    Those of ``news`` that were never used come at once. ``loss`` is what one step of each costs, in steps of the length
    in use.
    """
    timing = any(count for count, _ in bucket.times)
    for k in sorted(range(policy.k_max + 1), key=lambda k: (bucket.seen[k], abs(k - current), -k)):
        # Without timings there is nothing to learn from shorter drafts.
        if k == current or (k < current and not timing):
            continue
        if timing and bucket.seen[k] < 0 and k in news:
            return k
        # Each further length gets half the budget, which keeps the sum over all of them bounded.
        wait = policy.probe_steps * min(loss[k], abs(k - current)) * 2 ** abs(k - current) / policy.probe_cost
        if bucket.step - bucket.probe_ends >= policy.probe_gap and bucket.step - bucket.seen[k] > wait:
            return k
    return None


def observe(policy: Policy, state: State, observation: Observation) -> State:
    """The state after a step. Steps may be reported late."""
    if not observation.batch:
        return state
    positions = tuple(
        map(_decayed, state.positions, observation.reached, observation.accepted, [policy.window] * policy.k_max)
    )
    state = replace(state, positions=positions)
    size = bucket_of(observation.batch)
    bucket = state.buckets.get(size)
    if bucket is None or observation.seconds is None:
        return state
    used, seconds = observation.drafted, observation.seconds
    count, total = bucket.times[used]
    known = total / count if count else seconds
    times = [_decayed(old, 0.0, 0.0, policy.time_window) for old in bucket.times]
    if seconds < known / 2:
        # Chance makes steps slow, not fast: what was timed first (a kernel was compiled) or long ago does not hold.
        times[used] = 1.0, seconds
    else:
        times[used] = _decayed(bucket.times[used], 1.0, min(seconds, 2 * known), policy.time_window)
    if used == bucket.current and count >= _MEMORY:
        # What slows the length in use (longer contexts, a neighbour) slows the others too; probes correct their ratios.
        drift = times[used][1] / times[used][0] / known
        times = [time if k == used else (time[0], time[1] * drift) for k, time in enumerate(times)]
    return replace(state, buckets=MappingProxyType({**state.buckets, size: replace(bucket, times=tuple(times))}))


def _decayed(old: Sums, count: float, total: float, window: int) -> Sums:
    keep = 1 - 1 / window if old[0] > _MEMORY else 1.0
    return old[0] * keep + count, old[1] * keep + total


class DraftLength:
    """A policy and its state, as an engine calls them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.state = initial(policy)

    def choose(self, batch: int) -> int:
        """Tokens to draft for each of ``batch`` requests in the next step."""
        self.state, k = choose(self.policy, self.state, batch)
        return k

    def observe(
        self,
        batch: int,
        drafted: int,
        requests: Iterable[tuple[int, int]],
        seconds: float | None = None,
        headless: int = 0,
    ) -> None:
        """Report one step; see `Observation.of`."""
        seen = Observation.of(self.policy.k_max, batch, drafted, requests, seconds, headless)
        self.state = observe(self.policy, self.state, seen)

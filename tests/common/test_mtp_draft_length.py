"""The draft-length policy on simulated engines whose acceptance and step times are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.draft_length import (
    DraftLength,
    Observation,
    Policy,
    State,
    bucket_of,
    choose,
    costs,
    initial,
    merge,
    observe,
)

Cost = Callable[[int, int], float]
GOOD, USELESS, HIGH, WEAK = (0.85, 0.7, 0.6, 0.5, 0.45), (0.0,) * 5, (0.9,) * 5, (0.3,) * 5


def memory_bound(batch: int, k: int) -> float:
    return 0.02 * (1 + 0.07 * k)


def knee(batch: int, k: int) -> float:
    return 0.02 * (1 + 0.29 * k)


def compute_bound(batch: int, k: int) -> float:
    return 0.05 * (1 + 0.74 * k)


def roofline(batch: int, k: int) -> float:
    """Memory-bound while few tokens are verified, then compute-bound; drafting has a cost of its own."""
    return 0.02 * (max(1 + 0.02 * k, batch * (1 + k) / 96) + 0.04 * k)


COSTS: dict[str, Cost] = {f.__name__: f for f in (memory_bound, knee, compute_bound, roofline)}


@cache
def goodput(acceptance: tuple[float, ...], cost: Cost, batch: int) -> list[float]:
    """Tokens a second and request by K."""
    return [(1 + sum(math.prod(acceptance[:j]) for j in range(1, k + 1))) / cost(batch, k) for k in range(6)]


@dataclass
class Engine:
    """A simulated engine: log-normal noise on the step times, and a pause of eight steps in one of 500."""

    acceptance: tuple[float, ...]
    cost: Cost
    batch: int | Callable[[int], int] = 8
    noise: float = 0.05
    seed: int = 0
    delay: int = 0
    policy: Policy = Policy(5)
    pace: Callable[[int], float] = lambda step: 1.0  # what the machine's other work does to a step
    state: State | None = None
    chosen: list[int] = field(default_factory=list)

    def run(self, steps: int) -> float:
        """Run and return the share of tokens lost against the best fixed K of each step."""
        rng = np.random.default_rng(self.seed)
        state = self.state or initial(self.policy)
        self.chosen, pending, tokens, best, verified = [], [], 0.0, 0.0, 0
        for step in range(steps):
            batch = self.batch if isinstance(self.batch, int) else self.batch(step)
            state, k = choose(self.policy, state, batch)
            self.chosen.append(k)
            # With a delay, the step verifies what the one before drafted: the engine schedules ahead.
            checked, verified = (verified, k) if self.delay else (k, k)
            reached, accepted, left = [0] * 5, [0] * 5, batch
            for i in range(checked):
                reached[i] = left
                left = accepted[i] = int(rng.binomial(left, self.acceptance[i]))
            seconds = self.cost(batch, checked)
            noisy = (
                self.pace(step)
                * seconds
                * float(np.exp(self.noise * rng.standard_normal()))
                * (8 if rng.random() < 0.002 else 1)
            )
            known = noisy if checked == k else None
            pending.append(Observation(batch, checked, tuple(reached), tuple(accepted), known))
            if len(pending) > self.delay:
                state = observe(self.policy, state, pending.pop(0))
            speed = goodput(self.acceptance, self.cost, batch)
            tokens += speed[checked] * seconds
            best += max(speed) * seconds
        self.state = state
        return 1 - tokens / best

    def share(self, lengths: set[int], last: int) -> float:
        return sum(k in lengths for k in self.chosen[-last:]) / last


REGIMES = [
    (USELESS, memory_bound, 1, {0}),
    (USELESS, compute_bound, 64, {0}),
    (HIGH, memory_bound, 1, {5}),
    ((1.0,) * 5, memory_bound, 64, {5}),
    (GOOD, memory_bound, 8, {3, 4}),
    (GOOD, knee, 8, {2, 3}),
    (GOOD, compute_bound, 64, {1}),
    (WEAK, compute_bound, 8, {0}),
    (GOOD, roofline, 1, {3, 4, 5}),
    (GOOD, roofline, 64, {1}),
    (GOOD, roofline, 256, {0}),
]


@pytest.mark.parametrize(("acceptance", "cost", "batch", "best"), REGIMES)
def test_converges_to_the_best_length(acceptance: tuple[float, ...], cost: Cost, batch: int, best: set[int]) -> None:
    speed = goodput(acceptance, cost, batch)
    assert {speed.index(max(speed))} <= best and all(speed[k] > 0.96 * max(speed) for k in best)
    engine = Engine(acceptance, cost, batch)
    engine.run(2000)
    assert engine.share(best, 1000) > 0.85


def test_a_useless_head_costs_little() -> None:
    for cost in COSTS.values():
        engine = Engine(USELESS, cost, 8)
        assert engine.run(6000) < 0.02
        assert engine.share({0}, 5000) > 0.88


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("acceptance", [GOOD, USELESS, WEAK, (0.6, 0.5, 0.4, 0.3, 0.2), (0.0, 0.9, 0.9, 0.9, 0.9)])
def test_regret_against_the_best_fixed_length(acceptance: tuple[float, ...], cost: str) -> None:
    """With twice the noise of the other tests."""
    assert Engine(acceptance, COSTS[cost], 32, noise=0.1, seed=1).run(8000) < 0.03


def test_regret_with_batches_that_come_and_go() -> None:
    engine = Engine(GOOD, roofline, lambda step: round(16 * 2 ** (3 * math.sin(step / 300))), seed=2)
    assert engine.run(20000) < 0.03
    state = engine.state
    assert state is not None and len(state.buckets) == 7


def test_an_engine_that_schedules_ahead() -> None:
    for acceptance, cost, best in ((GOOD, knee, {2, 3}), (USELESS, memory_bound, {0}), (HIGH, memory_bound, {5})):
        engine = Engine(acceptance, cost, 16, delay=2)
        assert engine.run(6000) < 0.03 and engine.share(best, 3000) > 0.85


SHIFTS = {
    "useless to good, cheap": (USELESS, memory_bound, GOOD, memory_bound),
    "useless to good": (USELESS, knee, GOOD, knee),
    "useless to good, dear": (USELESS, compute_bound, HIGH, compute_bound),
    "good to useless, cheap": (GOOD, memory_bound, USELESS, memory_bound),
    "good to useless": (GOOD, knee, USELESS, knee),
    "cheap to dear": (GOOD, memory_bound, GOOD, compute_bound),
    "dear to cheap": (GOOD, compute_bound, GOOD, memory_bound),
    "three times slower": (GOOD, knee, GOOD, lambda batch, k: 3 * knee(batch, k)),
    "three times faster": (GOOD, knee, GOOD, lambda batch, k: knee(batch, k) / 3),
}


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("name", SHIFTS)
def test_follows_a_shift(name: str, batch: int) -> None:
    acceptance, cost, later, later_cost = SHIFTS[name]
    engine = Engine(acceptance, cost, batch)
    engine.run(1500)
    engine = replace(engine, acceptance=later, cost=later_cost, seed=1)
    engine.run(2500)
    engine = replace(engine, seed=2)
    assert engine.run(500) < 0.05


@pytest.mark.parametrize("slow", [1, 8])
def test_first_uses_that_are_slow(slow: int) -> None:
    """Kernels are compiled and graphs captured when a length is first used."""
    uses = [0] * 6

    def warming(batch: int, k: int) -> float:
        uses[k] += 1
        return knee(batch, k) * (50 if k and uses[k] <= slow else 1)

    engine = Engine(GOOD, knee, 8)
    state = initial(engine.policy)
    for _ in range(100):
        state, k = choose(engine.policy, state, 8)
        accepted = tuple(round(8 * math.prod(GOOD[: i + 1])) if i < k else 0 for i in range(5))
        reached = tuple([8, *accepted][i] if i < k else 0 for i in range(5))
        state = observe(engine.policy, state, Observation(8, k, reached, accepted, warming(8, k)))
    engine.state = state
    engine.run(4000)
    engine = replace(engine, seed=1)
    assert engine.run(1000) < 0.03


@pytest.mark.parametrize("acceptance", [USELESS, GOOD])
def test_one_pause_at_any_step(acceptance: tuple[float, ...]) -> None:
    """A pause where a length is first used says nothing about the others, and is no reason never to try it again."""
    for pause in range(60):
        engine = Engine(acceptance, knee, 8, pace=lambda step, pause=pause: 8.0 if step == pause else 1.0)
        engine.run(600)
        assert replace(engine, pace=lambda step: 1.0, seed=1).run(600) < 0.06, pause


@pytest.mark.parametrize("slow", [7, 40, 300])
def test_a_neighbour_that_halves_the_speed_now_and_then(slow: int) -> None:
    """Steps are twice as slow for ``slow`` steps, then as fast as they are for some three times as many."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pace: list[float] = []
        while len(pace) < 1500:
            pace += [1.0] * int(rng.exponential(3 * slow)) + [2.0] * int(rng.exponential(slow))
        engine = Engine(USELESS, knee, 8, seed=seed, pace=lambda step, pace=pace: pace[step])
        assert engine.run(1500) < 0.1, seed


def test_new_batch_sizes_start_from_what_others_showed() -> None:
    """A few hundred steps of each batch size; every length has been timed in the first one only."""
    sizes = (1, 4, 16, 64)
    for acceptance in (GOOD, WEAK, USELESS):
        engine = Engine(acceptance, roofline, lambda step: sizes[step // 300])
        assert engine.run(1200) < 0.04
        engine = replace(engine, batch=lambda step: sizes[-1 - step // 300], state=None)
        assert engine.run(1200) < 0.04


def test_a_longer_draft_never_counts_as_faster() -> None:
    policy = Policy(3)
    state = initial(policy)
    state, _ = choose(policy, state, 8)
    for k, seconds in enumerate((1.0, 4.0, 2.0, 5.0)):
        state = observe(policy, state, Observation(8, k, (0,) * 3, (0,) * 3, seconds))
    assert costs(policy, state, 8) == [1.0, 3.0, 3.0, 5.0]
    assert costs(policy, state, 32) == [1.0, 3.0, 3.0, 5.0]  # like the nearest
    state, _ = choose(policy, state, 32)
    state = observe(policy, state, Observation(32, 1, (0,) * 3, (0,) * 3, 6.0))
    assert costs(policy, state, 32) == [2.0, 6.0, 6.0, 10.0]


def test_untimed_lengths_are_scaled_from_the_nearest() -> None:
    policy = Policy(4, cost=lambda batch, k: 1.0 + k)
    state, k = choose(policy, initial(policy), 3)
    assert costs(policy, state, 4) == [1, 2, 3, 4, 5]
    state = observe(policy, state, Observation(3, k, (0,) * 4, (0,) * 4, (1 + k) * 0.5))
    assert costs(policy, state, 4) == [0.5, 1, 1.5, 2, 2.5]
    state = observe(policy, state, Observation(4, 4 if k == 0 else 0, (0,) * 4, (0,) * 4, 0.1 if k else 9.0))
    assert costs(policy, state, 4)[k] == (1 + k) * 0.5 and costs(policy, state, 4) != [0.5, 1, 1.5, 2, 2.5]


def test_no_flapping_between_equals() -> None:
    """Two and more lengths give the same; probes aside, the length in use hardly changes."""
    steps = 5000
    for batch in (1, 16):
        for edge in (0.0, 0.01):
            speed = goodput(GOOD, lambda batch, k: 1.0, batch)

            def tie(batch: int, k: int, speed: list[float] = speed, edge: float = edge) -> float:
                return 0.01 * speed[k] * (1 + edge * abs(k - 2))

            engine = Engine(GOOD, tie, batch)
            engine.run(1000)
            changes, last = 0, None
            for step in range(steps // 50):
                engine = replace(engine, seed=step)
                engine.run(50)
                assert engine.state is not None
                current = engine.state.buckets[bucket_of(batch)].current
                changes += last is not None and current != last
                last = current
            assert changes <= steps / 200
    engine = Engine(GOOD, knee, 16)
    engine.run(1000)
    changes = 0
    for step in range(100):
        engine = replace(engine, seed=step)
        engine.run(50)
        assert engine.state is not None
        changes += engine.state.buckets[16].current not in (2, 3)
    assert changes == 0


def test_replicas_that_merge_their_observations_agree() -> None:
    rng = np.random.default_rng(3)
    replicas = [DraftLength(Policy(3)) for _ in range(3)]
    sequence = []
    for step in range(3000):
        batches = [int(rng.integers(0, 9)) for _ in replicas]
        batches[step % 3] = max(1, batches[step % 3])
        lengths = {replica.choose(max(batches)) for replica in replicas}
        assert len(lengths) == 1
        k = lengths.pop()
        sequence.append(k)
        seen = []
        for batch in batches:
            counts = [(k, int(np.argmin([*(rng.random(k) < 0.7), False]))) for _ in range(batch)]
            seen.append(Observation.of(3, batch, k, counts, 0.02 * (1 + 0.2 * k) * float(rng.uniform(0.9, 1.1))))
        for order, replica in enumerate(replicas):
            replica.state = observe(replica.policy, replica.state, merge(seen[order:] + seen[:order]))
        assert replicas[0].state == replicas[1].state == replicas[2].state
    assert len(set(sequence)) > 1


def test_choosing_and_observing_leave_the_old_state_alone() -> None:
    engine = Engine(GOOD, knee, 8)
    engine.run(300)
    start = engine.state
    assert start is not None
    again = replace(engine, state=start)
    engine = replace(engine, state=start)
    assert engine.run(500) == again.run(500) and engine.chosen == again.chosen and engine.state == again.state


def test_without_timings_the_given_costs_decide() -> None:
    for acceptance, best in ((0.9, 5), (0.0, 0)):
        drafter = DraftLength(Policy(5, cost=memory_bound))
        rng = np.random.default_rng(4)
        chosen = []
        for _ in range(2000):
            k = drafter.choose(4)
            chosen.append(k)
            counts = [(k, int(np.argmin([*(rng.random(k) < acceptance), False]))) for _ in range(4)]
            drafter.observe(4, k, counts if k else [])
        assert chosen[1000:].count(best) / 1000 > 0.85
    assert chosen[1000:].count(0) < 1000, "a useless head is tried again"


def test_requests_become_counts_by_position() -> None:
    step = Observation.of(4, 6, 3, [(3, 0), (3, 1), (3, 3), (2, 2), (1, 0)], 0.5)
    assert step == Observation(6, 3, (5, 3, 1, 0), (3, 2, 1, 0), 0.5)
    idle = Observation.of(4, 0, 3, [], 0.75)
    assert merge([step, idle]) == replace(step, seconds=0.75)
    assert merge([step, replace(idle, seconds=None)]).seconds is None
    state = initial(Policy(4))
    assert observe(Policy(4), state, idle) == state


def test_buckets_are_powers_of_two() -> None:
    assert [bucket_of(batch) for batch in (1, 2, 3, 4, 5, 8, 9, 255, 257)] == [1, 2, 4, 4, 8, 8, 16, 256, 512]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Policy(0), "k_max=0: expected 1"),
        (lambda: Policy(3, window=1), "window=1: expected 2"),
        (lambda: Policy(3, probe_cost=0.0), "probe_cost=0.0: expected"),
        (lambda: Policy(3, prior=1.5), "prior=1.5"),
        (lambda: Observation.of(3, 1, 3, [(3, 4)]), "4 tokens accepted of 3 drafted"),
        (lambda: Observation.of(3, 1, 3, [(4, 1)]), "the longest draft has 3"),
        (lambda: Observation.of(3, 1, 4, []), "expected .* 0 to 3 tokens"),
        (lambda: Observation.of(3, 1, 1, [], -0.5), "positive time"),
        (lambda: Observation.of(3, 1, 1, [], math.nan), "positive time"),
        (lambda: DraftLength(Policy(3)).choose(0), "a batch of 0 requests: expected 1"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(FourfoldError, match=message):
        call()

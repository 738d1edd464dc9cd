"""Deployments of a model on hardware, ranked by tokens a second for each GPU against tokens a second for each user.

Every figure that this module makes is a prediction of the calibrated roofline (`roofline`, `calibrate`). Each point
says in what it goes beyond what the roofline was calibrated on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fourfold.common.recipe.planning.anchors import ANCHORS
from fourfold.common.recipe.planning.layouts import Roomy, name_of, roomy
from fourfold.common.recipe.planning.roofline import Calibration, Machine
from fourfold.common.recipe.planning.serving import Job, decode_rate, decode_step, prefill_seconds, shared_rate
from fourfold.common.recipe.schema import HardwareSheet, Parallel
from fourfold.common.recipe.sizing.fit import Fit
from fourfold.common.recipe.sizing.traits import Traits
from fourfold.common.recipe.sizing.weights import Weight

BUSIEST = 0.9  # load of prefill ranks; a queue grows without end at 1
MOST_PREFILL, MOST_DECODE = 16, 9  # replicas, as in published topologies
SIMILAR = 1.25  # a workload within this factor of the calibrated one is no extrapolation


@dataclass(frozen=True)
class Point:
    """One deployment at one load.

    Attributes:
        prefill: layout and replicas; None: one role does both.
        users: sequences on a data-parallel rank of decode.
        per_user: output tokens a second of a user while decoding; ``total`` and ``output``: a second and GPU.
        ttft: seconds to the first token, queueing for prefill included, KV transfer not.
        beyond: in what it goes beyond the calibration.
    """

    prefill: tuple[Parallel, int] | None
    decode: tuple[Parallel, int]
    drafts: int
    users: int
    per_user: float
    total: float
    output: float
    ttft: float
    gpus: int
    tight: bool = False
    beyond: tuple[str, ...] = ()
    kind: str = "predicted"

    @property
    def layout(self) -> str:
        decode = f"{self.decode[1]}x{name_of(self.decode[0])}"
        if self.prefill is None:
            return f"aggregated {name_of(self.decode[0])}"
        return f"{self.prefill[1]}x{name_of(self.prefill[0])} : {decode}"


@dataclass(frozen=True)
class Plan:
    """Attributes:
    points: all of them; ``front``: those that no other beats in both figures, fastest user first.
    beyond: in what all points go beyond the calibration.
    refused: layouts that do not fit, by role.
    """

    points: tuple[Point, ...]
    front: tuple[Point, ...]
    beyond: tuple[str, ...]
    refused: dict[str, list[Fit]] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is planned for."""

    traits: Traits
    weights: tuple[Weight, ...]
    sheet: HardwareSheet
    engine: str
    input_tokens: int
    output_tokens: int
    most_gpus: int
    acceptance: tuple[float, ...] = ()
    model: str = ""


def plan(subject: Subject, by: Calibration, per_user: float | None = None, ttft: float | None = None) -> Plan:
    """All deployments that fit, and the best of those that keep to the given service level."""
    found, refused = _points(subject, by)
    kept = [p for p in found if p.per_user >= (per_user or 0) and p.ttft <= (ttft or math.inf)]
    return Plan(tuple(found), tuple(front(kept)), tuple(beyond_all(subject)), refused)


def front(points: Iterable[Point]) -> list[Point]:
    """The Pareto front: fastest users first, each next one with more tokens for each GPU."""
    out: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.per_user, -p.total)):
        if not out or point.total > out[-1].total:
            out.append(point)
    return out


def _points(subject: Subject, by: Calibration) -> tuple[list[Point], dict[str, list[Fit]]]:
    job = (subject.input_tokens, subject.output_tokens)
    drafts = len(subject.acceptance)
    rooms: dict[str, list[Roomy]] = {}
    refused: dict[str, list[Fit]] = {}
    for role in ("aggregated", "prefill", "decode"):
        rooms[role], refused[role] = roomy(
            subject.traits, subject.weights, subject.sheet, subject.engine, role, job, drafts, subject.most_gpus
        )
    machines = {
        _key(room.parallel): Machine(subject.traits, subject.weights, room.parallel, subject.sheet, subject.engine)
        for room in (*rooms["aggregated"], *rooms["prefill"], *rooms["decode"])
    }
    out = [*_aggregated(subject, by, rooms["aggregated"], machines)]
    out += _disaggregated(subject, by, rooms["prefill"], rooms["decode"], machines)
    return out, refused


def _jobs(subject: Subject) -> Iterator[Job]:
    for drafts in range(len(subject.acceptance) + 1):
        accepted = subject.acceptance[drafts - 1] if drafts else 1.0
        yield Job(subject.input_tokens, subject.output_tokens, drafts, accepted)


def _aggregated(
    subject: Subject, by: Calibration, rooms: Sequence[Roomy], machines: dict[tuple[int, ...], Machine]
) -> Iterator[Point]:
    for room in rooms:
        machine, p = machines[_key(room.parallel)], room.parallel
        for job in _jobs(subject):
            prompt = prefill_seconds(machine, by, job)
            for users in _loads(room.users):
                per_user, requests = shared_rate(machine, by, job, users)
                load = requests * prompt
                wait = prompt * (1 + load / (2 * (1 - min(load, 0.99)))) + decode_step(machine, by, job, users)
                requests *= p.data
                yield _point(subject, None, (p, 1), job, users, per_user, requests, wait, room)


def _disaggregated(
    subject: Subject,
    by: Calibration,
    prefills: Sequence[Roomy],
    decodes: Sequence[Roomy],
    machines: dict[tuple[int, ...], Machine],
) -> Iterator[Point]:
    jobs = list(_jobs(subject))
    prompts = [(room, prefill_seconds(machines[_key(room.parallel)], by, jobs[0])) for room in prefills]
    for room in decodes:
        machine, p = machines[_key(room.parallel)], room.parallel
        for job in jobs:
            for users in _loads(room.users):
                per_user = decode_rate(machine, by, job, users)
                requests = users * p.data * per_user / job.output_tokens  # a second, of one decode replica
                for other, prompt in prompts:
                    need = requests * prompt / other.parallel.data  # prefill replicas that would be wholly busy
                    count = max(1, math.ceil(need / BUSIEST))
                    replicas = min(MOST_DECODE, max(1, int(BUSIEST / need))) if count == 1 else 1
                    gpus = count * other.parallel.world + replicas * p.world
                    if count > MOST_PREFILL or gpus > subject.most_gpus:
                        continue
                    load = need * replicas / count
                    ranks = count * other.parallel.data
                    wait = prompt * (1 + load / (2 * (1 - load) * ranks)) + decode_step(machine, by, job, users)
                    prefill = (other.parallel, count)
                    tight = room if room.fit.verdict == "tight" else other
                    yield _point(
                        subject, prefill, (p, replicas), job, users, per_user, requests * replicas, wait, tight
                    )


def _point(
    subject: Subject,
    prefill: tuple[Parallel, int] | None,
    decode: tuple[Parallel, int],
    job: Job,
    users: int,
    per_user: float,
    requests: float,
    ttft: float,
    room: Roomy,
) -> Point:
    gpus = decode[0].world * decode[1] + (prefill[0].world * prefill[1] if prefill else 0)
    total, output = requests * job.total / gpus, requests * job.output_tokens / gpus
    beyond = tuple(_beyond(prefill, decode, per_user, users))
    tight = room.fit.verdict == "tight"
    return Point(prefill, decode, job.drafts, users, per_user, total, output, ttft, gpus, tight, beyond)


def _loads(most: int) -> list[int]:
    """Users of a rank: powers of two and halves between, up to ``most``, and it."""
    steps = {n for e in range(11) for n in (2**e, 3 * 2**e // 2) if n <= most}
    return sorted(steps | {most})


def _key(p: Parallel) -> tuple[int, ...]:
    return p.tensor, p.data, p.expert


def beyond_all(subject: Subject) -> list[str]:
    """In what a whole plan goes beyond what the roofline was calibrated on."""
    used = [anchor for anchor in ANCHORS if anchor.calibrates]
    out = []
    models, machines = sorted({a.model for a in used}), sorted({a.hardware for a in used})
    if subject.model not in models:
        out.append(f"model {subject.model}: calibrated on {', '.join(models)}")
    if subject.sheet.id not in machines:
        out.append(f"hardware {subject.sheet.id}: calibrated on {', '.join(machines)}")
    for name, value, known in (
        ("input tokens", subject.input_tokens, {a.input_tokens for a in used}),
        ("output tokens", subject.output_tokens, {a.output_tokens for a in used}),
    ):
        if all(max(value / k, k / value) > SIMILAR for k in known):
            out.append(f"{value} {name}: calibrated on {', '.join(map(str, sorted(known)))}")
    return out


def _beyond(
    prefill: tuple[Parallel, int] | None, decode: tuple[Parallel, int], per_user: float, users: int
) -> Iterator[str]:
    used = [anchor for anchor in ANCHORS if anchor.calibrates]
    rates = [anchor.per_user for anchor in used if anchor.per_user]
    if not min(rates) / SIMILAR <= per_user <= max(rates) * SIMILAR:
        yield f"{per_user:.0f} tokens/s/user"
    # One role for both was calibrated in other layouts than decode alone, and with few users.
    same = [a for a in used if (a.prefill is None) == (prefill is None)]
    if _key(decode[0]) not in {_key(a.decode) for a in same}:
        yield name_of(decode[0])
    if prefill and _key(prefill[0]) not in {_key(a.prefill) for a in used if a.prefill}:
        yield f"prefill {name_of(prefill[0])}"
    if prefill is None and users * decode[0].data > SIMILAR * max(a.concurrency for a in same):
        yield f"{users * decode[0].data} users of one role"

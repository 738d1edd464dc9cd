"""From step times to a deployment's figures: tokens a second for each GPU and user, and time to first token."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.common.recipe.planning.roofline import Calibration, Machine

CHUNK = 8192  # tokens of a prefill step on a data-parallel rank


@dataclass(frozen=True)
class Job:
    """A request and how it is decoded: ``drafts`` tokens are drafted each step, ``accepted`` come out on average."""

    input_tokens: int
    output_tokens: int
    drafts: int = 0
    accepted: float = 1.0

    @property
    def total(self) -> int:
        return self.input_tokens + self.output_tokens


def prefill_seconds(machine: Machine, by: Calibration, job: Job) -> float:
    """Seconds in which one data-parallel rank reads one prompt, in chunks, its neighbours being as busy."""
    if job.input_tokens < CHUNK:  # several prompts share a step
        together = CHUNK / job.input_tokens
        return machine.step(by, CHUNK, together, job.input_tokens / 2) / together
    left, done, seconds = job.input_tokens, 0, 0.0
    while left > 0:
        chunk = min(CHUNK, left)
        seconds += machine.step(by, chunk, 1, done + chunk / 2)
        left, done = left - chunk, done + chunk
    return seconds


def decode_step(machine: Machine, by: Calibration, job: Job, users: float) -> float:
    """Seconds of one decode step with ``users`` sequences on a data-parallel rank, drafting included."""
    context = job.input_tokens + job.output_tokens / 2
    seconds = machine.step(by, users * (1 + job.drafts), users, context)
    if job.drafts:
        passes = 1 if machine.traits.dspark else job.drafts
        seconds += passes * machine.step(by, users * (job.drafts if machine.traits.dspark else 1), users, 0, draft=True)
    return seconds


def decode_rate(machine: Machine, by: Calibration, job: Job, users: float) -> float:
    """Tokens a second of each user where decoding is all that the rank does."""
    return job.accepted / decode_step(machine, by, job, users)


def shared_rate(machine: Machine, by: Calibration, job: Job, users: float) -> tuple[float, float]:
    """One role for both: (tokens/s/user while decoding, requests a second of a data-parallel rank).

    Every request that ends lets a prompt in, whose prefill holds up the others.
    """
    step = decode_step(machine, by, job, users)
    steps = job.output_tokens / job.accepted
    prompt = prefill_seconds(machine, by, job)
    held_up = max(0.0, users - 1) * prompt  # prompts of the others during one answer
    answer = steps * step + held_up
    return job.output_tokens / answer, users / (answer + prompt)


def prefill_limit(
    prefill: Machine, prefill_replicas: int, decode: Machine, decode_replicas: int, by: Calibration, job: Job
) -> float:
    """Total tokens a second for each GPU where prefill limits."""
    gpus = prefill.parallel.world * prefill_replicas + decode.parallel.world * decode_replicas
    requests = prefill_replicas * prefill.parallel.data / prefill_seconds(prefill, by, job)
    return requests * job.total / gpus

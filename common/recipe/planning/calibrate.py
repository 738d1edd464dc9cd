"""Efficiencies of the roofline, from published anchors; and how well they explain them.

The three constants are those with the smallest mean squared logarithmic error over the anchors that calibrate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.planning.anchors import ANCHORS, Anchor
from fourfold.common.recipe.planning.roofline import Calibration, Machine
from fourfold.common.recipe.planning.serving import Job, decode_rate, prefill_limit, shared_rate
from fourfold.common.recipe.schema import Parallel
from fourfold.common.recipe.sizing.quantisation import Formats
from fourfold.common.recipe.sizing.traits import Traits, read_config, read_traits
from fourfold.common.recipe.sizing.weights import Weight, weights

START = (math.log(50e-6), math.log(0.5), math.log(0.5))
HIGHEST = (math.log(1e-3), 0.0, 0.0)  # no share of a peak is above 1


@dataclass(frozen=True)
class Residual:
    """An anchor, what the calibrated model says of it, and the relative error."""

    anchor: Anchor
    published: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


@lru_cache(maxsize=32)
def shipped(name: str) -> tuple[Traits, tuple[Weight, ...]]:
    """Traits and weights of one of fourfold's own model cards."""
    known = Catalogue()
    card = known.model(name)
    config = read_config(known.model_path(name).parent / card.config)
    traits = read_traits(config, card.config)
    return traits, tuple(weights(traits, Formats(config, card.formats)))


@lru_cache(maxsize=128)
def _machine(name: str, parallel: tuple[int, int, int, int, int], hardware: str, engine: str) -> Machine:
    traits, found = shipped(name)
    tensor, data, expert, pipeline, context = parallel
    layout = Parallel(tensor=tensor, data=data, expert=expert, pipeline=pipeline, context=context)
    return Machine(traits, found, layout, Catalogue().hardware(hardware), engine)


def _of(anchor: Anchor, p: Parallel) -> Machine:
    layout = (p.tensor, p.data, p.expert, p.pipeline, p.context)
    return _machine(anchor.model, layout, anchor.hardware, anchor.engine)


def predicted(anchor: Anchor, by: Calibration) -> Residual:
    """What the model says of an anchor."""
    job = Job(anchor.input_tokens, anchor.output_tokens, anchor.drafts, anchor.accepted)
    decode = _of(anchor, anchor.decode)
    if anchor.metric == "total":
        users = anchor.concurrency / (anchor.decode.data * anchor.decode_replicas)
        requests = shared_rate(decode, by, job, users)[1] * anchor.decode.data
        return Residual(anchor, anchor.total, requests * job.total / anchor.decode.world)
    if anchor.metric == "prefill":
        assert anchor.prefill is not None
        prefill = _of(anchor, anchor.prefill)
        limit = prefill_limit(prefill, anchor.prefill_replicas, decode, anchor.decode_replicas, by, job)
        return Residual(anchor, anchor.total, limit)
    users = float(anchor.concurrency)
    if anchor.prefill is not None:  # users that the published throughput and interactivity imply
        gpus = anchor.prefill.world * anchor.prefill_replicas + anchor.decode.world * anchor.decode_replicas
        output = anchor.total * gpus * job.output_tokens / job.total
        users = output / anchor.per_user / (anchor.decode.data * anchor.decode_replicas)
    return Residual(anchor, anchor.per_user, decode_rate(decode, by, job, users))


def loss(by: Calibration, anchors: Sequence[Anchor]) -> float:
    """Mean squared logarithmic error."""
    errors = [math.log1p(predicted(anchor, by).error) ** 2 for anchor in anchors]
    return sum(errors) / len(errors)


@cache
def calibrate(anchors: tuple[Anchor, ...] = ANCHORS) -> Calibration:
    """The constants that explain the anchors best: a pattern search over their logarithms."""
    used = [anchor for anchor in anchors if anchor.calibrates]
    point, stride = list(START), math.log(2)
    best = loss(_constants(point), used)
    while stride > 0.005:
        improved = False
        for axis in range(3):
            for sign in (1, -1):
                trial = list(point)
                trial[axis] = min(HIGHEST[axis], trial[axis] + sign * stride)
                value = loss(_constants(trial), used)
                if value < best - 1e-9:
                    point, best, improved = trial, value, True
                    break
        if not improved:
            stride /= 2
    return _constants(point)


def _constants(point: Sequence[float]) -> Calibration:
    return Calibration(*(math.exp(value) for value in point))


def residuals(by: Calibration, anchors: Sequence[Anchor] = ANCHORS) -> list[Residual]:
    """Every anchor against its prediction, checks included."""
    return [predicted(anchor, by) for anchor in anchors]


def left_out(anchors: Sequence[Anchor] = ANCHORS) -> list[Residual]:
    """Each calibrating anchor against a model calibrated without it: the error to expect of figures not yet seen."""
    used = [anchor for anchor in anchors if anchor.calibrates]
    return [predicted(one, calibrate(tuple(a for a in used if a is not one))) for one in used]


def typical_error(found: Sequence[Residual]) -> float:
    """The root mean square of the logarithmic errors of calibrating anchors, as a relative error."""
    squares = [math.log1p(r.error) ** 2 for r in found if r.anchor.calibrates]
    return math.expm1(math.sqrt(sum(squares) / len(squares)))

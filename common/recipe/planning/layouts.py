"""Layouts that a plan considers, and how many users each holds in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fourfold.common.recipe.schema import HardwareSheet, Parallel, Workload
from fourfold.common.recipe.sizing.cache import CacheFormat
from fourfold.common.recipe.sizing.fit import Case, Fit, fit
from fourfold.common.recipe.sizing.options import Options
from fourfold.common.recipe.sizing.traits import Traits
from fourfold.common.recipe.sizing.weights import Weight

UTILISATION = {"vllm": 0.9, "sglang": 0.88}
PREFILL_TOKENS, DECODE_TOKENS = 8192, 1024  # of a step; more is reserved state that decode does not need
MOST_USERS = 1024
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Roomy:
    """A layout of one role that fits, and the sequences that one of its data-parallel ranks holds."""

    parallel: Parallel
    users: int
    fit: Fit


def name_of(parallel: Parallel) -> str:
    """The usual short name, such as DEP8 or TP4."""
    if parallel.data > 1:
        base = f"DEP{parallel.data}" if parallel.expert > 1 else f"DP{parallel.data}"
        return base if parallel.tensor == 1 else f"{base}xTP{parallel.tensor}"
    return f"{'TEP' if parallel.expert > 1 else 'TP'}{parallel.tensor}"


def possible(traits: Traits, sheet: HardwareSheet, most: int) -> list[Parallel]:
    """Layouts of one replica of at most ``most`` GPUs that divide heads and experts and fill nodes."""
    domain = max(sheet.nvlink_domain, sheet.gpus_per_node)
    out = []
    for size in SIZES:
        whole = size <= sheet.gpus_per_node or size % sheet.gpus_per_node == 0
        if size > min(most, domain) or not whole:
            continue
        if traits.heads % size == 0:
            out.append(Parallel(tensor=size))
        if size > 1 and traits.experts and traits.experts % size == 0:
            out.append(Parallel(data=size, expert=size))
    return out


def roomy(
    traits: Traits,
    weights: Sequence[Weight],
    sheet: HardwareSheet,
    engine: str,
    role: str,
    job: tuple[int, int],
    drafts: int,
    most: int,
) -> tuple[list[Roomy], list[Fit]]:
    """Layouts of a role that fit, and those that do not.

    Args:
        job: input and output tokens of a request.
        drafts: the largest number of draft tokens that is considered.
    """
    length = sum(job)
    batched = PREFILL_TOKENS if role != "decode" else DECODE_TOKENS
    kept, refused = [], []
    for parallel in possible(traits, sheet, most):
        mega = batched if parallel.expert > 1 and traits.count("v4") else 0
        options = Options(
            engine=engine,
            utilisation=UTILISATION[engine],
            batched=batched,
            sequences=16 if role == "prefill" else 256,
            max_length=length + 256,
            cache=CacheFormat("fp8", "mxfp4" if traits.count("v4") else "fp8"),
            captured=0 if role == "prefill" else 512,
            mega_tokens=mega,
            draft=drafts > 0,
            engram_offloaded=engine == "vllm",
            draft_tokens=drafts,
        )
        workload = Workload(kind="fixed", input_tokens=job[0], output_tokens=job[1])
        found = fit(Case(traits, tuple(weights), sheet, options, parallel, workload, role))
        if found.verdict == "does not fit":
            refused.append(found)
        else:
            kept.append(Roomy(parallel, max(1, min(found.space.sequences, MOST_USERS)), found))
    return kept, refused

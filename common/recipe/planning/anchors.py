"""Published figures that plans are calibrated on and checked against, and published acceptance of drafts.

Total tokens count input and output. An anchor without `calibrates` is only a check: its layout or its workload is not
fully published, or its model is another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fourfold.common.recipe.schema import Parallel

TP4 = Parallel(tensor=4)
TP8 = Parallel(tensor=8)
DEP4 = Parallel(data=4, expert=4)
DEP8 = Parallel(data=8, expert=8)
INFERENCEX = "InferenceX, August 2026 (github.com/SemiAnalysisAI/InferenceX)"
COOKBOOK = "SGLang cookbook, benchmarks of v0.5.15 (docs_new/cookbook)"


@dataclass(frozen=True)
class Anchor:
    """One published point.

    Attributes:
        metric: what is compared. ``user``: tokens/s/user at the published throughput; ``prefill``: total tokens/s/GPU
            where prefill limits; ``total``: total tokens/s/GPU at a concurrency.
        prefill, decode: layouts; ``prefill`` None: one role does both.
        per_user, total: tokens/s/user and total tokens/s/GPU as published.
        concurrency: requests in flight, for ``total``.
        drafts, accepted: draft tokens of a step, mean acceptance length.
    """

    what: str
    metric: Literal["user", "prefill", "total"]
    model: str
    hardware: str
    engine: str
    source: str
    decode: Parallel
    prefill: Parallel | None = None
    prefill_replicas: int = 1
    decode_replicas: int = 1
    input_tokens: int = 8192
    output_tokens: int = 1024
    per_user: float = 0.0
    total: float = 0.0
    concurrency: int = 0
    drafts: int = 0
    accepted: float = 1.0
    calibrates: bool = True


ANCHORS = (
    Anchor(
        "one user, TPOT 4.47 ms", "user", "deepseek-v4-pro", "gb300-nvl72", "sglang", COOKBOOK, TP4,
        per_user=1000 / 4.47, concurrency=1, drafts=3, accepted=2.49,
    ),
    Anchor(
        "one user", "total", "deepseek-v4-pro", "gb300-nvl72", "sglang", COOKBOOK, TP4,
        total=411, concurrency=1, drafts=3, accepted=2.49,
    ),
    Anchor(
        "16 users", "total", "deepseek-v4-pro", "gb300-nvl72", "sglang", COOKBOOK, TP4,
        total=2026, concurrency=16, drafts=3, accepted=2.49,
    ),
    Anchor(
        "27 tokens/s/user", "user", "deepseek-v4-pro", "gb300-nvl72", "vllm", INFERENCEX, DEP8, DEP4, 5,
        per_user=27, total=6182,
    ),
    Anchor(
        "plateau, 13 to 18 tokens/s/user", "user", "deepseek-v4-pro", "gb300-nvl72", "vllm", INFERENCEX, DEP8, DEP4, 6,
        per_user=15.5, total=10000,
    ),
    Anchor(
        "plateau", "prefill", "deepseek-v4-pro", "gb300-nvl72", "vllm", INFERENCEX, DEP8, DEP4, 6,
        per_user=15.5, total=10000,
    ),
    Anchor(
        "27 tokens/s/user", "user", "deepseek-v4-pro", "gb200-nvl72", "vllm", INFERENCEX, DEP8, DEP8, 2,
        per_user=27, total=2189,
    ),
    Anchor(
        "plateau", "prefill", "deepseek-v4-pro", "gb200-nvl72", "vllm", INFERENCEX, DEP8, DEP8, 2,
        per_user=15.5, total=8500,
    ),
    Anchor(
        "50 tokens/s/user with MTP", "user", "deepseek-v4-pro", "gb300-nvl72", "sglang",
        "PyTorch and LMSYS blog of 23 June 2026", DEP8, DEP4, 4, per_user=50, total=11200, drafts=3, accepted=2.49,
    ),
    Anchor(
        "50 tokens/s/user with MTP", "prefill", "deepseek-v4-pro", "gb300-nvl72", "sglang",
        "PyTorch and LMSYS blog of 23 June 2026", DEP8, DEP4, 4, per_user=50, total=11200, drafts=3, accepted=2.49,
    ),
    Anchor(
        "256 users, layout not published, read as DEP4", "total", "deepseek-v4-pro", "gb300-nvl72", "sglang", COOKBOOK,
        DEP4, total=3458, concurrency=256, drafts=1, accepted=1.79, calibrates=False,
    ),
    Anchor(
        "one user, hardware not published, read as GB300", "user", "qwen3.8-2.4t-nvfp4", "gb300-nvl72", "vllm",
        "recipe README of Qwen3.8", TP8, per_user=304, concurrency=1, drafts=3, accepted=3.39, calibrates=False,
    ),
)  # fmt: skip

# Mean acceptance length with 1, 2, ... draft tokens, the target's own token included: InferenceX's
# golden_al_distribution, SPEED-Bench coding, thinking on.
ACCEPTANCE: dict[str, tuple[float, ...]] = {
    "dsv4_mtp": (1.79, 2.27, 2.49, 2.54, 2.55),
    "dsv4_dspark": (1.84, 2.51, 3.01, 3.36, 3.61, 3.77, 3.73, 3.47),
    "glm5_mtp": (1.84, 2.50, 2.99, 3.33, 3.61, 3.78, 3.91, 4.06),
    "qwen3.5_mtp": (1.93, 2.73, 3.39, 3.97, 4.41, 4.80, 5.04, 5.21),
}
# Architecture (model_type) and drafter to a curve; other models need one given.
MEASURED_FOR: dict[tuple[str, str], str] = {
    ("deepseek_v4", "mtp"): "dsv4_mtp",
    ("deepseek_v4", "dspark"): "dsv4_dspark",
    ("glm_moe_dsa", "mtp"): "glm5_mtp",
    ("qwen3_5_moe", "mtp"): "qwen3.5_mtp",
    ("qwen3_5_moe_text", "mtp"): "qwen3.5_mtp",
}


def acceptance_of(model_type: str, drafter: str) -> tuple[float, ...]:
    """Published acceptance lengths by number of draft tokens; empty where none is known."""
    name = MEASURED_FOR.get((model_type, drafter))
    return ACCEPTANCE[name] if name else ()


def by_position(lengths: tuple[float, ...]) -> list[float]:
    """What each further draft token adds to the acceptance length: the chance that it is accepted."""
    before, out = 1.0, []
    for length in lengths:
        out.append(round(length - before, 4))
        before = length
    return out

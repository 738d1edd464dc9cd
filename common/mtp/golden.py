"""Mean acceptance lengths that the draft heads of known models reach, by draft length, and where each was measured.

A length counts the token that the target adds, so 1 is a head of which nothing is accepted. Only heads that belong to
the model are here: what a separately trained drafter reaches is a property of that drafter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_INFERENCEX = "InferenceX golden_al_distribution (SPEED-Bench coding)"


@dataclass(frozen=True)
class Golden:
    """One head.

    Attributes:
        model: what the served name contains; punctuation and case do not matter.
        method: how the head drafts.
        source: who measured, on what.
        thinking_on: mean acceptance length by draft length, where the model reasons first.
        thinking_off: the same where it answers at once.
    """

    model: str
    method: str
    source: str
    thinking_on: dict[int, float]
    thinking_off: dict[int, float]

    def lengths(self, k: int) -> dict[str, float]:
        """What was measured for drafts of ``k`` tokens, by mode; empty: nothing."""
        modes = {"thinking on": self.thinking_on, "thinking off": self.thinking_off}
        return {mode: by_k[k] for mode, by_k in modes.items() if k in by_k}


def _by_k(*lengths: float) -> dict[int, float]:
    """For drafts of 1, 2, ... tokens."""
    return dict(enumerate(lengths, 1))


GOLDEN: tuple[Golden, ...] = (
    Golden(
        "DeepSeek-V4-Pro",
        "MTP",
        f"{_INFERENCEX} run 27180633016",
        _by_k(1.79, 2.27, 2.49, 2.54, 2.55, 2.55, 2.54, 2.58),
        _by_k(1.92, 2.61, 2.97, 3.00, 3.10, 3.16, 3.00, 3.11),
    ),
    Golden(
        "DeepSeek-V4-Pro-0813",
        "DSpark",
        f"{_INFERENCEX} run 31742838308 (thinking on), dsv4_0813_dspark_probabilistic.yaml (off)",
        _by_k(1.84, 2.51, 3.01, 3.36, 3.61, 3.77, 3.73, 3.47),
        _by_k(1.94, 2.81, 3.58, 4.17, 4.74, 5.12, 5.24, 4.95),
    ),
    Golden("DeepSeek-V4.1-Flash", "DSpark", _INFERENCEX, {5: 3.51}, {}),
    Golden(
        "Qwen3.5-397B-A17B",
        "MTP",
        f"{_INFERENCEX} run 27317114007",
        _by_k(1.93, 2.73, 3.39, 3.97, 4.41, 4.80, 5.04, 5.21),
        _by_k(1.92, 2.70, 3.33, 3.83, 4.20, 4.48, 4.73, 4.71),
    ),
    Golden(
        "Qwen3.8-27B", "MTP", f"{_INFERENCEX} run 35490571863 (k=3), qwen3.8_mtp.yaml (k=7)", {3: 2.52, 7: 3.67}, {}
    ),
    Golden("Qwen3.8-Flash-Next", "MTP", f"{_INFERENCEX} run 33034290269", {3: 2.32}, {}),
    Golden(
        "GLM-5.2",
        "MTP",
        f"{_INFERENCEX} run 28058352479",
        _by_k(1.84, 2.50, 2.99, 3.33, 3.61, 3.78, 3.91, 4.06),
        {},
    ),
    # Heads that fourfold trained and ships.
    Golden("SmolLM2-135M-Instruct", "MTP", "tests/vllm/test_mtp_real.py", {}, {3: 1.49}),
)


def find(names: Iterable[str]) -> Golden | None:
    """The entry whose model any of ``names`` contains (served name, path); the most specific one."""
    plain = [_plain(name) for name in names]
    found = [golden for golden in GOLDEN if any(_plain(golden.model) in name for name in plain)]
    return max(found, key=lambda golden: len(golden.model), default=None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())

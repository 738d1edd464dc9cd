"""Where the time of a decoding step goes: the linear layers and the head, timed alone on the model's own shapes.

What an engine's step takes beyond them is attention, norms, sampling, the scheduler and the HTTP server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fourfold.common.bench import peers
from fourfold.common.bench.linear import measure
from fourfold.common.quant.layers import FUSED

ROUNDS = 3


@dataclass(frozen=True)
class Parts:
    """Milliseconds of one step of ``batch`` tokens: all linear layers in BF16 and in NVFP4, and the head in BF16."""

    batch: int
    layers_bf16: float
    layers_nvfp4: float
    head: float


def shapes(model: Path) -> tuple[Counter[tuple[int, int]], tuple[int, int]]:
    """How often each weight ``[N, K]`` occurs, q/k/v and gate/up fused as engines do; and the head's shape."""
    fused = {member: whole for whole, members in FUSED.items() for member in members}
    rows: Counter[tuple[str, int]] = Counter()
    tied = head = (0, 0)
    for name, shape in peers.headers(model):
        if peers.is_projection(name):
            prefix, last = name.removesuffix(".weight").rsplit(".", 1)
            rows[f"{prefix}.{fused.get(last, last)}", shape[1]] += shape[0]
        elif "lm_head" in name:
            head = (shape[0], shape[1])
        elif "embed_tokens" in name:
            tied = (shape[0], shape[1])
    return Counter((n, k) for (_, k), n in rows.items()), head if head[0] else tied


def bytes_per_token(model: Path) -> dict[str, int]:
    """Bytes of weights that one decoded token reads, for BF16 and NVFP4 (the head is BF16 in both)."""
    counts, head = shapes(model)
    layers, last = sum(count * n * k for (n, k), count in counts.items()), head[0] * head[1]
    return {"BF16": 2 * (layers + last), "NVFP4": layers * 9 // 16 + 2 * last}


def parts(model: Path, batches: Sequence[int], scheme: str) -> list[Parts]:
    """Time the linear layers of ``model``, each with weights that no cache holds."""
    counts, head = shapes(model)
    timed = {shape: measure(shape, batches, "cpu", scheme, ROUNDS) for shape in counts}
    heads = measure(head, batches, "cpu", scheme, ROUNDS)
    return [
        Parts(
            batch,
            sum(count * timed[shape][i].bf16_us for shape, count in counts.items()) / 1e3,
            sum(count * timed[shape][i].nvfp4_us for shape, count in counts.items()) / 1e3,
            heads[i].bf16_us / 1e3,
        )
        for i, batch in enumerate(batches)
    ]

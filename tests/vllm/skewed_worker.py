"""A hybrid worker whose clock says something else on each rank, so that ranks which time for themselves disagree."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from fourfold.vllm_ext import hybrid_worker


class SkewedWorker(hybrid_worker.HybridWorker):
    def __init__(self, vllm_config: Any, local_rank: int, rank: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, local_rank, rank, *args, **kwargs)
        chance, now = random.Random(rank), 0.0

        def perf_counter() -> float:
            nonlocal now
            now += chance.uniform(1, 10)
            return now

        hybrid_worker.time = SimpleNamespace(perf_counter=perf_counter)  # type: ignore[assignment]

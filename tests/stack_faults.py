"""Page faults of calls at many depths of Python's stack, in this process or, as an extension, in a worker of vLLM."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor

CALLS = 1000


def _leaf() -> None:
    pass


def _loop() -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(CALLS):
        _leaf()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def _down(depth: int) -> int:
    return _down(depth - 1) if depth else _loop()


def worst() -> int:
    """The most faults of `CALLS` calls at one depth; the depths span more than a chunk of the data stack."""
    return max(_down(depth) for depth in range(300))


def elsewhere() -> int:
    """`worst` in a new thread, whose stack nobody widened."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(worst).result()


class Extension:
    """``--worker-extension-cls stack_faults.Extension``"""

    def stack_faults(self) -> list[int]:
        return [worst(), elsewhere()]

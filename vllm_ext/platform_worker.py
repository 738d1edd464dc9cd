"""vLLM's worker of this platform, which fourfold's workers extend.

Import it before anything else of vLLM that loads its library: the worker for CPUs must be the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker

__all__ = ["Worker"]

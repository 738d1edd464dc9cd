"""A worker that counts what the engine's process asks of its own, by method."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fourfold.vllm_ext.platform_worker import Worker  # the first of vLLM

# isort: split

from vllm.v1.executor.multiproc_executor import WorkerProc


class CountingWorker(Worker):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: Counter[str] = Counter()
        execute = WorkerProc._execute_worker_rpc

        def _execute_worker_rpc(process: Any, request: Any) -> None:
            self.asked[str(request[0])] += 1
            execute(process, request)

        WorkerProc._execute_worker_rpc = _execute_worker_rpc  # type: ignore[method-assign]

    def messages(self) -> dict[str, int]:
        return dict(self.asked)

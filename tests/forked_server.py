"""Engine servers that share one import of the engine (tests only).

A user's server is three processes or more, and each imports the engine: twenty seconds before it answers. Here one
process imports it, every server is forked from that, and forks its own processes, so that a server takes a few
seconds. All else is the engine's: its command line, its variables, its log, its end. How processes start that a user
starts is left to `EngineServer`: `test_server.py` of both engines, rehearsals, and what `fourfold recipe run` starts.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import forkserver
from typing import Any
from unittest import mock

from fourfold.common.serving import EngineServer

# What the shared process imports; a server runs the last.
MODULES = {
    "vllm": ("vllm.v1.engine.async_llm", "vllm.v1.worker.cpu_worker", "vllm.entrypoints.openai.api_server"),
    "sglang": ("sglang.srt.entrypoints.http_server", "sglang.srt.models.registry", "sglang.launch_server"),
}


class ForkedServer(EngineServer):
    """An `EngineServer` whose processes are forked. A Python process starts those of one engine."""

    def start(self) -> None:
        """Start the process; `wait` waits for health."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(MODULES[self.engine]))
        with mock.patch.dict(os.environ, EngineServer(self.engine, "", self.log).environment()):
            forkserver.ensure_running()
        super().start()

    def _launch(self, env: dict[str, str]) -> Any:
        self.log.write_bytes(b"")
        return _Forked(self._context.Process(target=_serve, args=(env, self.command()[2:], str(self.log))))


@contextmanager
def forked(*modules: str) -> Iterator[None]:
    """Let these modules of `common.recipe.rehearsing` start their engines as `ForkedServer`."""
    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch(f"fourfold.common.recipe.rehearsing.{module}.EngineServer", ForkedServer))
        yield


class _Forked:
    """A process of multiprocessing under the names of `subprocess.Popen`."""

    def __init__(self, process: Any) -> None:
        self.process = process
        process.start()
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked server", timeout or 0)
        return self.process.exitcode


def _serve(env: dict[str, str], arguments: list[str], log: str) -> None:
    """Be the engine's server: ``arguments`` are its module and what follows it on the command line."""
    os.setsid()
    given: Any = multiprocessing
    given.process._parent_process = None  # a program of its own, not part of this one's
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    os.environ.clear()
    os.environ.update(env)
    _threads()
    os.register_at_fork(after_in_child=_threads)
    context: Any = multiprocessing.get_context("fork")
    multiprocessing.set_start_method("fork", force=True)
    given.set_start_method = lambda method, force=False: None
    given.get_context = lambda method=None: context
    if registry := sys.modules.get("vllm.model_executor.models.registry"):
        registry.__dict__["_run_in_subprocess"] = lambda look: look()  # not in a process that imports vLLM for it
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def _threads() -> None:
    """Take the number of threads, and their cores, from the variables that torch reads when it is imported."""
    import torch

    if count := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(count))
    if places := os.environ.get("OMP_PLACES", "").strip("{}"):
        os.sched_setaffinity(0, set(map(int, places.split(","))))

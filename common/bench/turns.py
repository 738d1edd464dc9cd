"""Servers that take turns: all are started, but only one is awake, the others are stopped by signal.

So a drift of the machine hits all alike.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from fourfold.common.serving import EngineServer, termination_raises

_STOPPABLE = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "86400"}  # vLLM's: a step during which a server was stopped is long


@contextmanager
def awake(server: EngineServer) -> Iterator[None]:
    """Let a stopped server go on."""
    server.signal(signal.SIGCONT)
    try:
        yield
    finally:
        server.signal(signal.SIGSTOP)


@contextmanager
def started(
    servers: Mapping[str, EngineServer], warm: Callable[[EngineServer], object], note: Callable[[str], object]
) -> Iterator[None]:
    """Start the servers one after the other, call ``warm`` with each and stop it by signal; in the end, end them.

    Call it in the main thread: a termination signal ends the servers too.

    Args:
        note: told what happens.
    """
    with ExitStack() as stack:
        stack.enter_context(termination_raises(SystemExit(128 + signal.SIGTERM)))
        for label, server in servers.items():
            note(f"starting {label}")
            stack.callback(server.stop)
            server.env = {**_STOPPABLE, **server.env}
            server.start()
            server.wait(1800, tick=lambda line, label=label: note(f"{label}: {line[-100:]}"))
            warm(server)
            server.signal(signal.SIGSTOP)
        yield

"""Servers that take turns: all are started, but only one is awake, the others are stopped by signal.

So a drift of the machine hits all alike.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from fourfold.common.serving import EngineServer


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
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        for label, server in servers.items():
            note(f"starting {label}")
            stack.callback(server.stop)
            server.start()
            server.wait(1800, tick=lambda line, label=label: note(f"{label}: {line[-100:]}"))
            warm(server)
            server.signal(signal.SIGSTOP)
        yield

"""A recipe's router as a process of this machine, before servers of this machine."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.common.errors import FourfoldError
from fourfold.common.serving import EngineServer, free_port

if TYPE_CHECKING:
    from fourfold.common.recipe.rendering.layout import Layout

LOCAL = "127.0.0.1"
READY = "/readiness"  # /health answers before the router knows its servers
MODULES = {"vllm-router": "vllm_router.launch_router", "sglang-router": "sglang_router.launch_router"}


@dataclass
class RouterServer(EngineServer):
    """A router, run as the servers are."""

    line: Sequence[str] = ()

    def command(self) -> list[str]:
        """The command line; the port of its metrics, unless the recipe says one, is one that is free now."""
        own = [] if "--prometheus-port" in self.line else ["--prometheus-port", str(free_port())]
        return [*self.line, *own]


def router(of: Layout, log: Path, port: int) -> RouterServer | None:
    """The router before the servers of a layout, which all are on this machine; None: nothing is to be routed.

    Raises:
        FourfoldError: its package is not installed.
    """
    from fourfold.common.recipe.rendering.layout import router_command, router_kind

    kind = router_kind(of)
    line = router_command(of, lambda process: LOCAL, port)
    if kind is None or line is None:
        return None
    router_version(kind)
    options = _options(line)
    options[options.index("--host") + 1] = LOCAL
    line = [sys.executable, "-m", MODULES[kind], *options]
    return RouterServer(of.engine, of.model, log, port=port, health=READY, line=line)


def router_version(package: str) -> str:
    """The installed version of a router.

    Raises:
        FourfoldError: it is not installed.
    """
    if not importlib.util.find_spec(MODULES[package].split(".")[0]):
        raise FourfoldError(f"the recipe has several servers, whose router is not installed: pip install {package}")
    return metadata.version(package)


def _options(line: Sequence[str]) -> list[str]:
    """A command without what it starts."""
    first = next(i for i, word in enumerate(line) if word.startswith("--"))
    return list(line[first:])

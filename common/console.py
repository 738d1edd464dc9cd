"""Where commands print their tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_FILE_WIDTH = 160  # a file has no width that a table has to fit into


def wide_console() -> Console:
    """Standard output, as wide as the terminal or as a table may want."""
    from rich.console import Console

    out = Console()
    if not out.is_terminal:
        out.width = _FILE_WIDTH
    return out

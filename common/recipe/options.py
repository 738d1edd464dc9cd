"""Options that the subcommands of ``fourfold recipe`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Roots = Annotated[
    list[Path] | None,
    typer.Option(
        "--catalogue",
        help="Folder with recipes, model cards and sheets of your own; repeatable. It goes before ours.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

"""What a check says of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
LEVELS = ("schema", "parser", "environment", "configuration", "rules", "rehearsed")  # L0 to L5


@dataclass(frozen=True)
class Rename:
    """A change that ``--fix`` can make.

    Attributes:
        kind: ``option``, ``env`` or ``env_to_option``.
        new: the new name; None takes the old one away.
        value: the new value, where it changes too.
    """

    kind: Literal["option", "env", "env_to_option"]
    old: str
    new: str | None
    value: object = None


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        level: 0 to 5, an index of `LEVELS`. An error keeps a recipe below this level.
        engine: engine and version, such as ``vllm 0.32.0``; None: not of one engine.
        where: path in the recipe, such as ``engines.vllm.roles.decode.args.moe-backend``.
        source: what the rule rests on (file of the engine's source, pull request, page).
    """

    level: int
    severity: Severity
    where: str
    message: str
    engine: str | None = None
    source: str | None = None
    rename: Rename | None = None

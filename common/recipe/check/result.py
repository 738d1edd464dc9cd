"""What a check says of a recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
LEVELS = ("schema", "parser", "environment", "configuration", "rules", "rehearsed")  # L0 to L5


@dataclass(frozen=True)
class Rename:
    """A change that ``--fix`` can make.

    Attributes:
        kind: ``option``, ``env`` or ``env_to_option``.
        old: the name as the recipe has it; a key inside an option's mapping follows a dot.
        new: the new name; None takes the old one away.
        value: the new value, where it changes too.
        effect: what an engine does with the old name: it refuses to start, ignores it, or warns and obeys.
        why: what became of it.
        source: where that is said.
    """

    kind: Literal["option", "env", "env_to_option"]
    old: str
    new: str | None
    value: object = None
    effect: Literal["refused", "ignored", "deprecated"] = "refused"
    why: str = ""
    source: str = ""

    @property
    def text(self) -> str:
        """One line: old name, what the engine does with it, new name."""
        new = "take it away" if self.new is None else f"use {'option ' * (self.kind == 'env_to_option')}{self.new}"
        value = "" if self.value is None else f": {json.dumps(self.value)}"
        return f"{self.old} is {self.effect}; {new}{value}" + (f" ({self.why})" if self.why else "")


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

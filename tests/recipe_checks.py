"""Recipes with one thing wrong each, and one check of all recipes for a test run: importing an engine takes seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold.common.recipe.check.checking import Check, check
from fourfold.common.recipe.check.result import Finding
from fourfold.common.recipe.check.targets import Target, discover
from fourfold.common.recipe.loading import Catalogue

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Wrong:
    """A recipe and what a check must say of it.

    Attributes:
        level: the highest level that it passes.
        at: level of the finding.
        where: end of the finding's path.
        says: part of its message.
    """

    level: int
    at: int
    where: str
    says: str
    severity: str = "error"
    model: str = "deepseek-v4-pro"
    hardware: str = "gb300-nvl72"
    parallel: dict[str, int] = field(default_factory=lambda: {"data": 4, "expert": 4})
    args: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    new_name: str | None = None  # of the rename that comes with it

    def write(self, root: Path, engine: str, name: str) -> None:
        """As a file of a catalogue."""
        recipe = {
            "schema": "fourfold/recipe/1",
            "id": f"wrong/{name}",
            "title": name,
            "model": self.model,
            "hardware": self.hardware,
            "workload": {"kind": "chat", "input_tokens": 1024, "output_tokens": 256},
            "engines": {
                engine: {
                    "versions": ">=0.0.1",
                    "args": self.args,
                    "env": self.env,
                    "roles": {"aggregated": {"parallel": self.parallel}},
                }
            },
        }
        folder = root / "wrong"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))

    def found(self, checked: Check) -> list[Finding]:
        """The findings that match."""
        return [
            finding
            for finding in checked.findings
            if finding.level == self.at
            and finding.severity == self.severity
            and finding.where.endswith(self.where)
            and self.says in finding.message
        ]


def checks_of(engine: str, wrong: dict[str, Wrong], folder: Path) -> dict[tuple[str, str], Check]:
    """All shipped recipes of an engine and the wrong ones, by the engines that are below ``.envs``.

    Returns:
        Recipe and version to the check.
    """
    for name, case in wrong.items():
        case.write(folder, engine, name)
    known = Catalogue([folder])
    recipes = [recipe for recipe in map(known.recipe, known.recipe_paths) if engine in recipe.engines]
    return {(done.recipe, done.version): done for done in check(recipes, known, engines(engine))}


def engines(engine: str, versions: Sequence[str] = ()) -> list[Target]:
    """The engines below ``.envs``, by version."""
    return [t for t in discover(envs=ROOT / ".envs") if t.engine == engine and (not versions or t.version in versions)]


def shipped(engine: str) -> list[str]:
    """Ids of the shipped recipes for an engine."""
    known = Catalogue()
    return [name for name in known.recipe_paths if engine in known.recipe(name).engines]

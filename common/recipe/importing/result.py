"""What a reader found, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fourfold.common.recipe.check.result import Rename


def short(value: Any, limit: int = 120) -> str:
    """A value of a file for a message: one line of printable text."""
    text = "".join(char for char in " ".join(str(value)[:8192].split()) if char.isprintable())
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass
class Server:
    """One role as its source has it.

    Attributes:
        options: option to value, as the source writes them.
        gpus: of one replica, as the source counts; None: it does not.
    """

    role: Literal["prefill", "decode", "aggregated"]
    options: dict[str, Any]
    env: dict[str, Any] = field(default_factory=dict)
    replicas: int = 1
    gpus: int | None = None


@dataclass
class Deployment:
    """One deployment point of a source file.

    Attributes:
        models: names of the model, the surest first.
        unknown: parts of the file that have no place in a recipe, one line each.
    """

    name: str
    engine: Literal["vllm", "sglang"]
    models: list[str]
    gpu: str
    servers: list[Server]
    image: str | None = None
    kind: Literal["fixed", "chat", "agentic"] = "fixed"
    input_tokens: int | None = None
    output_tokens: int | None = None
    concurrency: int | None = None
    router: dict[str, Any] | None = None
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Refusal:
    """A setting that an engine's version does not take, after all repairs."""

    engine: str
    where: str
    message: str


@dataclass
class Imported:
    """A recipe made of a deployment.

    Attributes:
        data: the recipe's mapping, as its file says it.
        rot: role and rename, for each old name that was there.
        refused: engine versions that would have refused the recipe as it was published.
        left: what those versions still refuse.
        unknown: what has no place in the recipe or could not be told.
        loads: whether model card and hardware sheet are known, and the recipe loads.
    """

    source: Path
    data: dict[str, Any]
    rot: list[tuple[str, Rename]]
    refused: list[str]
    left: list[Refusal]
    unknown: list[str]
    loads: bool

    @property
    def id(self) -> str:
        return str(self.data["id"])

    def renames(self) -> list[tuple[str, Rename]]:
        """Each rename once, with the roles that had it."""
        roles: dict[Rename, list[str]] = {}
        for role, rename in self.rot:
            roles.setdefault(rename, []).append(role)
        return [(", ".join(dict.fromkeys(names)), rename) for rename, names in roles.items()]

    @property
    def repaired(self) -> bool:
        """It had rot that engines refuse or ignore, and no version refuses it now."""
        return not self.left and any(rename.effect != "deprecated" for _, rename in self.rot)

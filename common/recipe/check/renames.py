"""Options and environment variables that an engine renamed or removed: the table, and what it says of a recipe.

The table is data, ``renames.yaml`` of the recipes, each entry with its source. Nothing here changes a file; see `fix`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import Field, field_validator, model_validator

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check.result import Rename
from fourfold.common.recipe.loading import parse, read_yaml
from fourfold.common.strict import Strict

TABLE = Path(str(files("fourfold.recipes"))) / "renames.yaml"
WHOLE = re.compile("-?[0-9]{1,18}")  # text of a whole number
OTHER = "*"  # any old value that an entry does not list
_MISSING = object()


def _specifier(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        raise ValueError("expected a version specifier such as '>=0.32'") from None
    return text


class Entry(Strict):
    """One old name and what became of it; `recipes/renames.yaml` explains the fields."""

    option: str | None = None
    env: str | None = None
    to: str | None = Field(default=None, description="new name of the same kind; absent: gone")
    to_option: str | None = Field(default=None, description="option that took an environment variable's place")
    values: dict[str, Any] | None = None
    versions: str | None = Field(default=None, description="narrower than the engine's own")
    effect: Literal["refused", "ignored", "deprecated"]
    why: str = ""
    source: str = Field(min_length=1)

    @field_validator("versions")
    @classmethod
    def _versions(cls, text: str | None) -> str | None:
        return None if text is None else _specifier(text)

    @model_validator(mode="after")
    def _one_name(self) -> Entry:
        if (self.option is None) == (self.env is None):
            raise ValueError("expected either option or env")
        if self.to_option and (self.option or self.to):
            raise ValueError("to_option: only for env, and without to")
        return self


class EngineTable(Strict):
    """The entries of one engine."""

    versions: str
    entries: list[Entry]

    _check = field_validator("versions")(_specifier)


class Table(Strict):
    """`recipes/renames.yaml`."""

    schema_: Literal["fourfold/renames/1"] = Field(alias="schema")
    engines: dict[Literal["vllm", "sglang"], EngineTable]


@lru_cache(maxsize=4)
def table(path: Path = TABLE) -> Table:
    """The table.

    Raises:
        FourfoldError: the file is not one.
    """
    return parse(Table, read_yaml(path), path)


def suggestions(engine: str, version: str, options: Mapping[str, Any], env: Mapping[str, Any]) -> list[Rename]:
    """What to change so that this version of the engine understands it.

    Args:
        engine: ``vllm`` or ``sglang``.
        version: such as ``0.32.0``; what follows ``+`` does not count.
        options: option to value, as in a recipe's ``args``.
        env: variable to value.
    """
    try:
        at = Version(Version(version).base_version)
    except InvalidVersion:
        raise FourfoldError(f"version {version!r} of {engine}: expected one such as 0.32.0") from None
    known = next((part for name, part in table().engines.items() if name == engine), None)
    if known is None or at not in SpecifierSet(known.versions, prereleases=True):
        return []
    out: list[Rename] = []
    for entry in known.entries:
        if entry.versions is not None and at not in SpecifierSet(entry.versions, prereleases=True):
            continue
        if entry.env is not None:
            if entry.env in env:
                kind = "env_to_option" if entry.to_option else "env"
                out += _rename(entry, kind, entry.env, entry.to_option or entry.to, env[entry.env])
        elif entry.option is not None:
            for where, value in _find(options, entry.option):
                out += _rename(entry, "option", where, entry.to, value)
    return out


def renamed(
    options: Mapping[str, Any], env: Mapping[str, Any], renames: Iterable[Rename]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and environment with the renames made; what is already there under a new name stays."""
    options, env = copy.deepcopy(dict(options)), dict(env)
    for rename in renames:
        if rename.kind == "option":
            order = list(options)
            value = _take(options, rename.old)
            if value is not _MISSING and rename.new is not None:
                _put(options, rename.new, value if rename.value is None else rename.value)
                options = _in_place(options, order, rename.old, rename.new)
        elif rename.old in env:
            value = env.pop(rename.old)
            if rename.new is not None:
                value = value if rename.value is None else rename.value
                _put(options, rename.new, value) if rename.kind == "env_to_option" else env.setdefault(
                    rename.new, value
                )
    return options, env


def value_of(options: Mapping[str, Any], path: str) -> Any:
    """An option's value by name or ``name.key``, whichever way it is written; None: not there."""
    return next((value for _, value in _find(options, path)), None)


def as_mapping(value: Any) -> dict[str, Any] | None:
    """An option's mapping, written as one or as JSON text; None: it is neither."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _rename(
    entry: Entry, kind: Literal["option", "env", "env_to_option"], old: str, new: str | None, value: Any
) -> list[Rename]:
    """The rename that an entry makes of a value: none where it does not speak of that value."""
    changed = None
    if entry.values is not None:
        said = str(value).lower()
        key = said if said in entry.values else OTHER
        if key not in entry.values:
            return []
        changed = entry.values[key]
        if changed is None:
            new = None
    elif kind == "env_to_option":
        text = str(value)
        changed = int(text) if WHOLE.fullmatch(text) else value
    return [Rename(kind, old, new, changed, entry.effect, entry.why, entry.source)]


def _same(written: str, name: str) -> bool:
    return written.replace("_", "-") == name.replace("_", "-")


def _find(options: Mapping[str, Any], path: str) -> list[tuple[str, Any]]:
    """Where ``name`` or ``name.key`` is: the path as it is written, and the value."""
    name, _, key = path.partition(".")
    out = []
    for written, value in options.items():
        head, _, tail = written.partition(".")
        if not _same(head, name):
            continue
        if tail == key:
            out.append((written, value))
        elif key and not tail:
            inside = as_mapping(value)
            if inside is not None and key in inside:
                out.append((f"{written}.{key}", inside[key]))
    return out


def _take(options: dict[str, Any], path: str) -> Any:
    """Take away what `_find` found; an option whose mapping becomes empty goes with it."""
    if path in options:
        return options.pop(path)
    name, _, key = path.partition(".")
    inside = as_mapping(options.get(name))
    if inside is None or key not in inside:
        return _MISSING
    value = inside.pop(key)
    if inside:
        options[name] = inside
    else:
        del options[name]
    return value


def _in_place(options: dict[str, Any], order: list[str], old: str, new: str) -> dict[str, Any]:
    """The options in their former order, a new name where the old one was."""
    place = {name: i for i, name in enumerate(order)}
    if old in place:
        place.setdefault(new, place[old])
    return dict(sorted(options.items(), key=lambda item: place.get(item[0], len(place))))


def _put(options: dict[str, Any], path: str, value: Any) -> None:
    """Set ``name`` or ``name.key`` where it is not set."""
    if _find(options, path):
        return
    name, _, key = path.partition(".")
    if not key:
        options[name] = value
        return
    written = next((option for option in options if _same(option, name)), name)
    options[written] = {**(as_mapping(options.get(written)) or {}), key: value}

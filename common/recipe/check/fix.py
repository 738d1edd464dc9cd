"""Make renames in a recipe's file: only the text of what changes is touched, so comments and layout stay.

All or nothing: the edited text is read back, and unless it says exactly what was meant the file keeps its bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check.renames import renamed
from fourfold.common.recipe.check.result import Rename
from fourfold.common.recipe.loading import read_yaml


@dataclass(frozen=True)
class _Edit:
    """Characters ``start`` to ``end`` of the file become ``text``."""

    start: int
    end: int
    text: str


class _Unplaceable(Exception):
    """The layout around an edit is not one that this module knows."""


def apply(path: Path, engine: str, renames: Sequence[Rename]) -> list[str]:
    """Rewrite the file with the renames made in the engine's ``args`` and ``env``, its roles' included.

    Returns:
        One line for each place that changed.

    Raises:
        FourfoldError: an edit cannot be placed, or an old name is not in this file; nothing was changed.
    """
    data = read_yaml(path)
    plan = (data.get("engines") or {}).get(engine) if isinstance(data.get("engines"), dict) else None
    done: list[str] = []
    used: list[Rename] = []
    wanted = _renamed_plan(plan, engine, renames, done, used) if isinstance(plan, dict) else None
    for rename in renames:
        if rename not in used:
            base = data.get("extends")
            hint = f"it comes from {base}: fix that recipe" if base else "nothing was changed"
            raise FourfoldError(f"{path}: {rename.old}: not among the settings of {engine} in this file; {hint}")
    if wanted is None or not done:
        return []
    text = path.read_bytes().decode("utf-8")
    node = _at(yaml.compose(text, Loader=yaml.SafeLoader), "engines", engine)
    names = {rename.old: rename.new for rename in renames if rename.new is not None}
    try:
        edits = _edits(text, node, wanted, names)
    except _Unplaceable as reason:
        raise FourfoldError(f"{path}: {reason}; nothing was changed, make the edit by hand") from None
    _replace(path, _edited(text, edits), {**data, "engines": {**data["engines"], engine: wanted}})
    return done


def _renamed_plan(
    plan: Mapping[str, Any], engine: str, renames: Sequence[Rename], done: list[str], used: list[Rename]
) -> dict[str, Any]:
    """The engine's mapping with the renames made; notes what it did in ``done`` and ``used``."""
    wanted = _renamed_scope(plan, f"engines.{engine}", renames, done, used)
    roles = plan.get("roles")
    if isinstance(roles, dict):
        wanted["roles"] = {
            name: _renamed_scope(role, f"engines.{engine}.roles.{name}", renames, done, used)
            if isinstance(role, dict)
            else role
            for name, role in roles.items()
        }
    return wanted


def _renamed_scope(
    scope: Mapping[str, Any], where: str, renames: Sequence[Rename], done: list[str], used: list[Rename]
) -> dict[str, Any]:
    args, env = scope.get("args") or {}, scope.get("env") or {}
    here: dict[str, Rename] = {}
    for rename in renames:
        if renamed(args, env, [rename]) == (args, env):
            continue
        other = here.setdefault(rename.old, rename)
        if (other.new, other.value) != (rename.new, rename.value):
            raise FourfoldError(
                f"{where}: {rename.old}: becomes {other.new}: {other.value!r} in one role and {rename.new}: "
                f"{rename.value!r} in another; nothing was changed, make the edit by hand"
            )
        used.append(rename)
    new_args, new_env = renamed(args, env, list(here.values()))
    done += [f"{where}: {rename.text}" for rename in here.values()]
    wanted = dict(scope)
    for key, old, new in (("args", args, new_args), ("env", env, new_env)):
        if new != old:
            wanted[key] = new
    return wanted


def _at(node: yaml.Node | None, *keys: str) -> yaml.MappingNode:
    for key in keys:
        assert isinstance(node, yaml.MappingNode)
        node = next(value for name, value in node.value if name.value == key)
    assert isinstance(node, yaml.MappingNode)
    return node


def _edits(text: str, node: yaml.MappingNode, wanted: Mapping[str, Any], names: Mapping[str, str]) -> list[_Edit]:
    """What turns the mapping's text into the wanted one. ``names``: old name to new, with or without a parent."""
    pairs = [(key, value) for key, value in node.value]
    have = [key.value for key, _ in pairs]
    ends = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in names.items()} | dict(names)
    added = [key for key in wanted if key not in have]
    out: list[_Edit] = []
    gone = []
    for i, (key, value) in enumerate(pairs):
        name = key.value
        if name not in wanted:
            new = ends.get(name)
            if new not in added:
                gone.append(i)
                continue
            added.remove(new)
            out.append(_Edit(key.start_mark.index, key.end_mark.index, _shown(new)))
            name = new
        out += _value_edits(text, value, wanted[name], names)
    if not gone and not added:
        return out
    if len(gone) == len(pairs):
        return [_whole(text, node, wanted)]
    out += [_removal(text, node, i) for i in gone]
    if added:
        out.append(_insertion(text, node, {key: wanted[key] for key in added}))
    return out


def _value_edits(text: str, node: yaml.Node, wanted: Any, names: Mapping[str, str]) -> list[_Edit]:
    if yaml.load(yaml.serialize(node), Loader=yaml.SafeLoader) == wanted:
        return []
    if isinstance(node, yaml.MappingNode) and isinstance(wanted, dict):
        return _edits(text, node, wanted, names)
    return [_whole(text, node, wanted)]


def _whole(text: str, node: yaml.Node, wanted: Any) -> _Edit:
    """Replace a value. A mapping in block layout becomes one on a line, after its key."""
    end = _end(node)
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        start = text.rindex(":", 0, node.start_mark.index) + 1
        between = text[start : node.start_mark.index]
        if between.strip():
            raise _Unplaceable(f"line {node.start_mark.line + 1}: a comment stands before what changes")
        return _Edit(start, end, f" {_shown(wanted)}")
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        raise _Unplaceable(f"line {node.start_mark.line + 1}: text over several lines")
    return _Edit(node.start_mark.index, end, _shown(wanted))


def _removal(text: str, node: yaml.MappingNode, i: int) -> _Edit:
    """Take a pair away: its lines in block layout, its text and a comma on a line."""
    key, value = node.value[i]
    start, end = key.start_mark.index, _end(value)
    if not node.flow_style:
        line = text.rfind("\n", 0, start) + 1
        if text[line:start].strip():
            raise _Unplaceable(f"line {key.start_mark.line + 1}: {key.value} does not begin its line")
        return _Edit(line, _line_end(text, end), "")
    if i + 1 < len(node.value):
        return _Edit(start, node.value[i + 1][0].start_mark.index, "")
    return _Edit(_end(node.value[i - 1][1]), end, "")


def _insertion(text: str, node: yaml.MappingNode, pairs: Mapping[str, Any]) -> _Edit:
    """Add pairs after the last one, in the mapping's own layout."""
    last = _end(node.value[-1][1])
    shown = [f"{_shown(key)}: {_shown(value)}" for key, value in pairs.items()]
    if node.flow_style:
        return _Edit(last, last, "".join(f", {pair}" for pair in shown))
    end = _line_end(text, last)
    lines = "".join(" " * node.value[0][0].start_mark.column + pair + "\n" for pair in shown)
    return _Edit(end, end, lines if text[:end].endswith("\n") else "\n" + lines)


def _end(node: yaml.Node) -> int:
    """The character after a value; a block collection's own mark lies beyond comments that follow it."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return _end(node.value[-1][1])
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return node.end_mark.index


def _line_end(text: str, at: int) -> int:
    """The start of the next line."""
    end = text.find("\n", at)
    return len(text) if end < 0 else end + 1


def _shown(value: Any) -> str:
    """A value as YAML that may stand in a flow mapping."""
    return yaml.safe_dump([value], default_flow_style=True, width=1 << 20, sort_keys=False).strip()[1:-1]


def _edited(text: str, edits: Sequence[_Edit]) -> str:
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end), reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


def _replace(path: Path, text: str, wanted: Mapping[str, Any]) -> None:
    """Write beside the file, read it back, and only then put it in its place."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        try:
            same = read_yaml(beside) == wanted
        except FourfoldError:
            same = False
        if not same:
            raise FourfoldError(f"{path}: its layout does not allow these edits; nothing was changed, edit by hand")
        shutil.copymode(path, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

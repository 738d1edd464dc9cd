"""YAML without surprises: a file of at most 256 KiB that holds one mapping of plain values.

No anchors, aliases, tags or merge keys, no key twice, no depth beyond 20, no characters that a terminal acts on. Words
and numbers read as in JSON: ``on``, ``yes`` and ``012`` are text, ``1e9`` is a number; only dates (``2026-08-01``) are
more than JSON has.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.values import control_characters

LARGEST = 256 << 10
DEEPEST = 20
_PLAIN = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("timestamp", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", list("0123456789")),
)


class _Loader(yaml.SafeLoader):
    """Plain values only."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem("aliases are not allowed", event)
        if getattr(event, "anchor", None):
            raise _problem("anchors are not allowed", event)
        if getattr(event, "tag", None):
            raise _problem(f"the tag {event.tag!r} is not allowed", event)
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > DEEPEST:
            raise _problem(f"nested beyond {DEEPEST} levels", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except ValueError as error:  # a date that is none, a number of too many digits
            raise _problem(f"{node.value[:80]!r}: {str(error).split(';')[0]}", node) from None
        hidden = next(control_characters(value), None) if isinstance(value, str) else None
        if hidden is not None:
            raise _problem(f"{value[:80]!r}: the character {hidden!r} is not allowed", node)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _problem(f"key {str(key)[:80]!r}; expected text (quote it)", key_node)
            if key == "<<":
                raise _problem("merge keys are not allowed", key_node)
            if key in out:
                raise _problem(f"key {key[:80]!r} twice", key_node)
            out[key] = self.construct_object(value_node, deep=True)
        return out

    def construct_yaml_map(self, node: Any) -> Any:
        yield self.construct_mapping(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
for _name, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def _problem(text: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=at.start_mark)


def read_bytes(path: Path, largest: int) -> bytes:
    """A small file's bytes.

    Raises:
        FourfoldError: not readable, or longer than ``largest`` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except (OSError, ValueError) as error:
        raise FourfoldError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > largest:
        raise FourfoldError(f"{path}: larger than {largest >> 10} KiB; expected a short text")
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        FourfoldError: not readable, too large, or not plain YAML.
    """
    data = read_bytes(path, LARGEST)
    try:
        value = yaml.load(data.decode("utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise FourfoldError(f"{path}: not UTF-8 text ({error})") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        context = f"{error.context}, " if error.context else ""
        raise FourfoldError(f"{path}:{line} {context}{error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FourfoldError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if value is None:
        raise FourfoldError(f"{path}: empty; expected a mapping")
    if not isinstance(value, dict):
        raise FourfoldError(f"{path}: expected a mapping, got {type(value).__name__}")
    return value

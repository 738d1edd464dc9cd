"""Words of a shell script from values of a recipe: every value is quoted, only marks become variables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from fourfold.common.recipe.launch import Start, flags

_MARK = re.compile("\0([a-z]+)\0")


def word(text: str, variables: Mapping[str, str]) -> str:
    """One shell word that is ``text``; a mark becomes the double-quoted variable that ``variables`` has for it.

    >>> word("a b", {})
    "'a b'"
    >>> word("\\0head\\0:80", {"head": "${nodes[0]}"})
    '"${nodes[0]}":80'
    """
    parts = _MARK.split(text)
    if len(parts) == 1:
        return shlex.quote(text)
    out = []
    for i, part in enumerate(parts):
        if i % 2:
            out.append(f'"{variables[part]}"')
        elif part:
            out.append(shlex.quote(part))
    return "".join(out)


def lines(words: Sequence[str], start: Start, variables: Mapping[str, str]) -> list[str]:
    """A command that begins with ``words``, quoted already, with one option of ``start`` on each line."""
    options = []
    for name, value in start.options.items():
        options.append(" ".join(word(item, variables) for item in flags(start.engine, {name: value})))
    return [" ".join(words), *options]


def command(parts: Sequence[str], indent: str) -> str:
    """The lines of one command."""
    return f" \\\n{indent}  ".join(parts)

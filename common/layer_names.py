"""How checkpoints name the layers that a quantisation config applies to or ignores."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from fourfold.common.errors import FourfoldError


def matches(name: str, pattern: str, subtree: bool) -> bool:
    """Match a layer name: exact, ``re:`` from the start, glob; with ``subtree`` also any run of its components.

    Raises:
        FourfoldError: what follows ``re:`` is not a regular expression.
    """
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise FourfoldError(f"{pattern!r} in quantization_config is not a regular expression: {error}") from None
    if name == pattern or (any(c in pattern for c in "*?[") and fnmatchcase(name, pattern)):
        return True
    return subtree and f".{pattern}." in f".{name}."

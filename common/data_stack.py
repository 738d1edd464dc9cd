"""Calls that do not cross a boundary of CPython's data stack over and over.

CPython 3.11 and later keep Python frames on a stack of chunks of 16 KiB. A call that does not fit maps another chunk,
and its return unmaps it: a loop that happens to run just below a boundary pays two system calls and page faults for
each call (python/cpython issue 142183; 3.13 and 3.14 were mended in March 2026, 3.11 and 3.12 were not). `roomy` runs a
function in a frame that does not fit a small chunk: CPython maps a large one, which frames further in share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

# A frame of 128 KiB makes CPython map 256 KiB, the next power of two. What a frame leaves unused stays untouched.
_SLOTS = 1 << 14


def roomy(function: F) -> F:
    """``function``, whose calls and theirs have some 100 KiB of data stack before the next boundary."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = cast(FunctionType, call)
    code.__code__ = code.__code__.replace(co_stacksize=_SLOTS)
    return cast(F, call)

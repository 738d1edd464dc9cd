"""Functions of SGLang that fourfold hooks through SGLang's own registry, when a worker or a draft that needs it starts.

Nothing is hooked in a process that has neither.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from fourfold.common.errors import FourfoldError

_installed: set[str] = set()


def install(hooks: Mapping[str, Callable[..., Any]], kind: HookType) -> None:
    """Hook each dotted path, once in a process.

    Raises:
        FourfoldError: SGLang could not hook one, which it only logs.
    """
    originals = {target: _found(target) for target in hooks if target not in _installed}
    for target in originals:
        HookRegistry.register(target, hooks[target], kind)
    HookRegistry.apply_hooks()
    for target, original in originals.items():
        if original is None or getattr(_found(target), "__wrapped__", None) is not original:
            raise FourfoldError(f"{target} could not be hooked; `fourfold doctor` shows which SGLang versions fit")
    _installed.update(originals)


def _found(target: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return None

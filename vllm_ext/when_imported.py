"""Change a module of vLLM now if this process has imported it, else as soon as it does.

A process that vLLM forks inherits what its parent changed and calls no plugin again; the parent may import what the
child runs only after it has called the plugins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from fourfold.common.log import get_logger

Change = Callable[[Any], None]


def when_imported(name: str, change: Change) -> None:
    """Call ``change`` with the module ``name``, once; what it raises later than now is logged."""
    if name in sys.modules:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, change))


class _Waiting(MetaPathFinder):
    """Finds one module, once, as the finders behind it do."""

    def __init__(self, name: str, change: Change) -> None:
        self.name, self.change = name, change

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                try:
                    self.change(module)
                except Exception as error:  # vLLM goes on without
                    get_logger(__name__).warning("fourfold: %s is as vLLM has it: %s", fullname, error)

            loader.exec_module = exec_module
        return spec

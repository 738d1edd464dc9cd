"""What Python source defines, found by reading it: nothing is imported."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path


def missing(path: str, parameters: tuple[str, ...], root: Path) -> str | None:
    """What the source below ``root`` lacks of ``path``, as ``module:name`` or ``module:Class.member``; None: nothing.

    Args:
        parameters: names that it must accept, as a function.
    """
    module, _, name = path.partition(":")
    base = root / Path(*module.split("."))
    file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
    if not file.is_file():
        return f"module {module} is not there"
    owner, _, member = name.partition(".")
    found = _definitions(parse(file)).get(owner)
    if found is None:
        return f"{module} does not define {owner}"
    if member:
        if not isinstance(found, ast.ClassDef):
            return f"{owner} is not a class"
        found = _definitions(found).get(member) or _assigned_on_self(found, member)
        if found is None:
            return f"{owner} has no {member}"
    if parameters:
        if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            return f"{name} is not a function"
        arguments = found.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        accepted = {argument.arg for argument in every if argument is not None}
        lacking = [parameter for parameter in parameters if parameter not in accepted]
        if lacking:
            return f"{name} does not take {', '.join(lacking)}"
    return None


@cache
def parse(file: Path) -> ast.Module:
    """The syntax tree of ``file``, read once."""
    return ast.parse(file.read_text(encoding="utf-8"))


def _definitions(node: ast.AST) -> dict[str, ast.AST]:
    """What the body of a module or class defines by statement, imports included, also under if and try."""
    found: dict[str, ast.AST] = {}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[child.name] = child
        elif isinstance(child, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0]: child for alias in child.names}
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            found |= {target.id: child for target in targets if isinstance(target, ast.Name)}
        elif isinstance(child, ast.If | ast.Try | ast.With):
            found |= _definitions(child)
    return found


def _assigned_on_self(owner: ast.ClassDef, name: str) -> ast.AST | None:
    for node in ast.walk(owner):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name:
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return node
    return None

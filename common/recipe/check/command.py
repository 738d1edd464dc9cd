"""``fourfold recipe check``, ``snapshot`` and ``matrix``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.options import Json, Roots

if TYPE_CHECKING:
    from fourfold.common.recipe.check.checking import Check
    from fourfold.common.recipe.check.result import Finding
    from fourfold.common.recipe.loading import Catalogue
    from fourfold.common.recipe.schema import Recipe

Pythons = Annotated[
    list[str] | None,
    typer.Option(
        "--python",
        help="Where an engine is: engine@version=PATH of its interpreter, or of a folder with its unpacked wheel, "
        "which then runs on the interpreter of another version of that engine. Repeatable.",
    ),
]
Envs = Annotated[
    Path | None,
    typer.Option("--envs", help="Folder of virtual environments to look for engines in; default: .envs, if it exists."),
]


def check(
    recipe: Annotated[
        list[str] | None,
        typer.Argument(help="Recipe id, file, or folder of recipes; repeatable. None: every recipe there is."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", help="Only this engine or version, such as vllm@0.33; repeatable."),
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Make the renames that findings suggest, then check again.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Keep the levels as proofs beside the recipes.")] = False,
    snapshots_only: Annotated[
        bool, typer.Option("--snapshot", help="Do not start an engine: parser and variables by snapshot, at most L2.")
    ] = False,
    pythons: Pythons = None,
    envs: Envs = None,
    timeout: Annotated[float, typer.Option(help="Seconds that an engine may take for one process of a recipe.")] = 120,
    catalogue: Roots = None,
    as_json: Json = False,
) -> None:
    """Check recipes with the engines themselves: parser, variables, configuration on a simulated machine, rules.

    Engines are looked for in this interpreter, in `--python` and below `.envs`; for a version that is not here, a
    snapshot of its options and variables stands in, and the result says so. Nothing is downloaded and no GPU is needed.
    Exit status: 0 no errors, 1 errors, 2 bad input.
    """
    from fourfold.common.recipe.check import checking, proofs, targets

    known, found, broken = _recipes(recipe or [], catalogue or [])
    here = [] if snapshots_only else targets.discover(pythons or [], envs)
    asked = checking.available(here, engine or [])

    def say(text: str) -> None:
        typer.echo(text, err=True)

    def run() -> list[Check]:
        return checking.check(found, known, asked, timeout, say)

    checks = run()
    if fix and _fix(checks, known, say):
        known, found, broken = _recipes(recipe or [], catalogue or [])
        checks = run()
    if write:
        for path in proofs.record(checks, known):
            say(f"wrote {path}")
    if as_json:
        typer.echo(json.dumps({"checks": [_data(c) for c in checks], "invalid": broken}, indent=1))
    else:
        for line in _lines(checks, broken):
            typer.echo(line)
    if broken or any(c.errors for c in checks):
        raise typer.Exit(1)


def snapshot(
    engine: Annotated[
        list[str] | None, typer.Option("--engine", help="Only this engine or version, such as vllm@0.33; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: fourfold's own.")] = None,
    pythons: Pythons = None,
    envs: Envs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: file to what it holds, in numbers.")] = False,
) -> None:
    """Write the options and environment variables of the engines that are here, for checks without them.

    Exit status 2: none is here, or one cannot be asked.
    """
    from fourfold.common.recipe.check import snapshots, targets

    here = targets.discover(pythons or [], envs)
    if engine:
        pairs = [targets.wanted(text) for text in engine]
        here = [t for t in here if any(targets.matches(t, *pair) for pair in pairs)]
    if not here:
        raise FourfoldError("no such engine here; install one, or say where with --python")
    folder, written = out or snapshots.FOLDER, {}
    for target in here:
        taken = snapshots.take(target)
        path = folder / f"{target.engine}-{target.version}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(snapshots.text(taken))
        written[str(path)] = {key: len(taken[key]) for key in ("options", "env", "read")}
        if not as_json:
            typer.echo(f"wrote {path}: {len(taken['options'])} options, {len(taken['env'])} variables")
    if as_json:
        typer.echo(json.dumps(written, indent=1))


def matrix(
    write: Annotated[
        bool, typer.Option("--write", help="Write README.md of the recipes instead of printing it.")
    ] = False,
    catalogue: Annotated[
        Path | None, typer.Option("--catalogue", help="A folder of recipes; default: fourfold's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: recipe to engine version to proof.")] = False,
) -> None:
    """The page of recipe x engine version x proof level, from the recipes and the proofs beside them.

    Exit status 1 with neither --write nor --json: the page that is there differs.
    """
    from fourfold.common.recipe.check import matrix as pages
    from fourfold.common.recipe.check import proofs
    from fourfold.common.recipe.loading import Catalogue

    known = Catalogue([catalogue] if catalogue else None)
    root = catalogue or known.roots[-1]
    if as_json:
        kept = proofs.load(root / "proofs" / "proofs.json")
        typer.echo(json.dumps({r: {e: asdict(p) for e, p in of.items()} for r, of in kept.items()}, indent=1))
        return
    text, path = pages.page(known, root), root / pages.PAGE
    if write:
        path.write_text(text)
        typer.echo(f"wrote {path}")
        return
    typer.echo(text, nl=False)
    if not path.is_file() or path.read_text() != text:
        typer.echo(f"{path} differs; --write writes it", err=True)
        raise typer.Exit(1)


def _recipes(asked: Sequence[str], roots: Sequence[Path]) -> tuple[Catalogue, list[Recipe], list[dict[str, str]]]:
    """The recipes asked for, and those of a folder (or of all) that are not valid, with why."""
    from fourfold.common.recipe.loading import FOLDERS, Catalogue

    known = Catalogue(list(roots))
    found: list[Recipe] = []
    broken: list[dict[str, str]] = []
    names = [(text, False) for text in asked if not Path(text).is_dir()]
    for text in asked:
        if Path(text).is_dir():
            files = sorted({*Path(text).glob("*.yaml"), *Path(text).glob("*/*.yaml")})
            files = [f for f in files if f.resolve().parent.name not in FOLDERS and "fourfold/recipe/" in _head(f)]
            if not files:
                raise FourfoldError(f"{text}: no recipes in this folder")
            names += [(str(file), True) for file in files]
    if not asked:
        names = [(str(path), True) for path in known.recipe_paths.values()]
    for text, lenient in names:
        try:
            found.append(known.recipe(text))
        except FourfoldError as error:
            if not lenient:
                raise
            broken.append({"file": text, "message": str(error)})
    return known, found, broken


def _head(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4096).decode(errors="replace")
    except OSError:
        return ""


def _fix(checks: Sequence[Check], known: Catalogue, say: Any) -> bool:
    """Make the renames; returns whether any file changed."""
    from fourfold.common.recipe.check.fix import apply

    wanted: dict[tuple[str, str], list[Any]] = {}
    for result in checks:
        for finding in result.findings:
            if finding.rename is not None:
                renames = wanted.setdefault((result.recipe, result.engine), [])
                if finding.rename not in renames:
                    renames.append(finding.rename)
    changed = False
    for (recipe, engine), renames in wanted.items():
        for line in apply(known.find(recipe), engine, renames):
            say(f"fixed {line}")
            changed = True
    return changed


def _data(result: Check) -> dict[str, Any]:
    return {
        "recipe": result.recipe,
        "engine": result.engine,
        "version": result.version,
        "level": result.level,
        "by": result.by,
        "findings": [asdict(finding) for finding in result.findings],
        "resolved": result.resolved,
    }


def _lines(checks: Sequence[Check], broken: Sequence[dict[str, str]]) -> list[str]:
    out = []
    for result in checks:
        by = " by snapshot" if result.by == "snapshot" else ""
        out.append(f"{result.recipe}: {result.label}: L{result.level}{by}")
        out += [f"  {_line(finding)}" for finding in result.findings]
    out += [f"invalid: {line}" for item in broken for line in item["message"].splitlines()]
    errors = sum(result.errors for result in checks) + len(broken)
    warnings = sum(finding.severity == "warning" for result in checks for finding in result.findings)
    out.append(f"{len(checks)} check(s): {errors} error(s), {warnings} warning(s)")
    return out


def _line(finding: Finding) -> str:
    source = f" [{finding.source}]" if finding.source else ""
    fix = f"; --fix: {finding.rename.text}" if finding.rename else ""
    return f"{finding.severity} L{finding.level} {finding.where}: {finding.message}{source}{fix}"

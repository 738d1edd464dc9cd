"""Write a model card, its config and a recipe into a folder that is a catalogue: all of them, or nothing.

All are written and loaded in a directory beside the folder first. A folder that does not exist appears by one rename;
files of one that does are renamed one by one, the recipe last, and put back where that fails.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.dayzero.compose import Composed
from fourfold.common.recipe.dayzero.source import Found
from fourfold.common.recipe.launch import starts
from fourfold.common.recipe.loading import Catalogue


def write(out: Path, found: Found, composed: Composed, force: bool, roots: list[Path]) -> dict[str, Path]:
    """Write; returns the paths of ``recipe``, ``card`` and ``config``.

    Args:
        force: replace files that are there.
        roots: further catalogues, for the hardware sheet.

    Raises:
        FourfoldError: files are there, ``out`` cannot be written, or what was composed does not load.
    """
    card, recipe = composed.card, composed.recipe
    files = {
        "config": (f"models/{card['config']}", _config(found)),
        "card": (f"models/{card['id']}.yaml", _yaml(card)),
        "recipe": (f"{recipe['id']}.yaml", _yaml(recipe)),
    }
    there = [str(out / name) for name, _ in files.values() if (out / name).exists()]
    if there and not force:
        raise FourfoldError(f"{', '.join(there)}: there already; --force replaces, --out or --name write elsewhere")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            for name, data in files.values():
                (staged / name).parent.mkdir(exist_ok=True)
                (staged / name).write_bytes(data)
            _try(Catalogue([staged, *roots]), staged / files["recipe"][0])
            if out.exists():
                _move(staged, out, [name for name, _ in files.values()])
            else:
                staged.chmod(0o755)
                staged.rename(out)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise FourfoldError(f"--out {out}: {error.strerror or error}") from None
    return {kind: out / name for kind, (name, _) in files.items()}


def _try(catalogue: Catalogue, path: Path) -> None:
    """Load it, and derive every command line."""
    found = catalogue.recipe(path)
    for engine in found.engines:
        for start in starts(found, engine, catalogue.model(found.model), catalogue.hardware(found.hardware)):
            start.arguments  # noqa: B018 - raises where options and engine do not fit


def _move(staged: Path, out: Path, names: list[str]) -> None:
    """Rename into ``out``; where that fails, what was there is there again."""
    done: list[tuple[Path, Path | None]] = []
    try:
        for i, name in enumerate(names):
            target = out / name
            target.parent.mkdir(exist_ok=True)
            kept = staged / f"before-{i}" if target.exists() else None
            if kept is not None:
                shutil.copy2(target, kept)
            os.replace(staged / name, target)
            done.append((target, kept))
    except OSError:
        for target, kept in reversed(done):
            if kept is None:
                target.unlink()
            else:
                os.replace(kept, target)
        raise


def _config(found: Found) -> bytes:
    """As published where nothing was put in."""
    return json.dumps(found.raw, indent=1).encode() + b"\n" if found.quantised_apart else found.path.read_bytes()


def _yaml(data: dict[str, Any]) -> bytes:
    unshared = json.loads(json.dumps(data))  # what is said twice is written twice: no anchors
    return yaml.safe_dump(unshared, sort_keys=False, allow_unicode=True, width=110).encode()

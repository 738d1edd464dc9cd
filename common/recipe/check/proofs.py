"""Proof levels of recipes, as the command wrote them: ``proofs/proofs.json`` beside the recipes.

A proof belongs to a digest: of the recipe with all that it extends, its model's config, its hardware sheet, the
processes that it starts and the engine's version. Where any of them has changed since, the proof is stale and shows no
level. Dates are of the first check with this outcome.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check.checking import Check, digest_parts
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.schema import Recipe

SCHEMA = "fourfold/proofs/1"


@dataclass(frozen=True)
class Proof:
    """What was proven of a recipe with one engine's version.

    Attributes:
        level: 0 to 4, of the check.
        by: ``engine`` or ``snapshot``.
        digest: see the module; also what `stale` compares.
        rehearsed: date of a rehearsal of this digest, which makes level 4 level 5; None: none.
        apart: by what transport and router prefill and decode ran apart there; None: they did not.
        loaded: the engine's classes of the model, which loaded there while another architecture ran; None: none did.
    """

    level: int
    by: str
    date: str
    digest: str
    errors: int = 0
    warnings: int = 0
    rehearsed: str | None = None
    apart: str | None = None
    loaded: str | None = None

    @property
    def shown(self) -> int:
        """The level, 5 where it was rehearsed, too."""
        return 5 if self.level == 4 and self.rehearsed else self.level


Proofs = dict[str, dict[str, Proof]]  # recipe to engine and version (``vllm 0.32.0``) to proof


def digest(recipe: Recipe, catalogue: Catalogue, engine: str, version: str) -> str:
    """What a proof of this recipe with this engine's version rests on."""
    parts = [*digest_parts(recipe, catalogue, engine), f"{engine} {version}"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_of(catalogue: Catalogue, recipe: str) -> Path:
    """Where the proofs of a recipe are kept: beside the folder of its file."""
    return catalogue.find(recipe).resolve().parent.parent / "proofs" / "proofs.json"


def load(path: Path) -> Proofs:
    """Proofs of a file; none where there is no file.

    Raises:
        FourfoldError: not such a file.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}; expected {SCHEMA!r}")
        return {
            recipe: {label: Proof(**proof) for label, proof in proofs.items()}
            for recipe, proofs in data["proofs"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FourfoldError(f"{path}: {error}; `fourfold recipe check --write` writes it anew, take it away") from None


def save(path: Path, proofs: Proofs) -> None:
    """Write proofs, ordered, whole or not at all."""
    ordered: dict[str, Any] = {
        recipe: {label: _written(proof) for label, proof in sorted(of.items())} for recipe, of in sorted(proofs.items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps({"schema": SCHEMA, "proofs": ordered}, indent=1) + "\n")
    os.replace(beside, path)


def _written(proof: Proof) -> dict[str, Any]:
    return {
        name: value for name, value in asdict(proof).items() if value is not None or name not in ("apart", "loaded")
    }


def current(recipe: Recipe, catalogue: Catalogue, proofs: Proofs, engine: str, version: str) -> Proof | None:
    """The proof of the recipe as it is now; None: never checked, or stale."""
    proof = proofs.get(recipe.id, {}).get(f"{engine} {version}")
    return proof if proof is not None and proof.digest == digest(recipe, catalogue, engine, version) else None


def record(checks: Sequence[Check], catalogue: Catalogue) -> list[Path]:
    """Keep what checks showed; a check by snapshot does not replace an engine's of the same digest.

    Returns:
        The files written.
    """
    today = datetime.date.today().isoformat()
    by_file: dict[Path, Proofs] = {}
    for check in checks:
        path = file_of(catalogue, check.recipe)
        proofs = by_file.setdefault(path, load(path))
        recipe = catalogue.recipe(catalogue.find(check.recipe))
        same = digest(recipe, catalogue, check.engine, check.version)
        before = proofs.get(check.recipe, {}).get(check.label)
        kept = before if before is not None and before.digest == same else None
        if kept is not None and check.by == "snapshot" and kept.by == "engine":
            continue
        warnings = sum(finding.severity == "warning" for finding in check.findings)
        earlier = (None, None, None) if kept is None else (kept.rehearsed, kept.apart, kept.loaded)
        proof = Proof(check.level, check.by, today, same, check.errors, warnings, *earlier)
        if kept is None or asdict(kept) | {"date": ""} != asdict(proof) | {"date": ""}:
            proofs.setdefault(check.recipe, {})[check.label] = proof
    for path, proofs in by_file.items():
        known = {
            recipe for recipe in proofs if recipe in catalogue.recipe_paths or any(c.recipe == recipe for c in checks)
        }
        save(path, {recipe: of for recipe, of in proofs.items() if recipe in known})
    return sorted(by_file)


def record_rehearsal(
    recipe: Recipe,
    catalogue: Catalogue,
    engine: str,
    version: str,
    apart: str | None = None,
    loaded: str | None = None,
) -> Path:
    """Note that a rehearsal of the recipe as it is now passed with this engine's version (level 5).

    Args:
        apart, loaded: see `Proof`.

    Raises:
        FourfoldError: it has not been checked as it is now.
    """
    path = file_of(catalogue, recipe.id)
    proofs = load(path)
    proof = current(recipe, catalogue, proofs, engine, version)
    if proof is None:
        raise FourfoldError(f"recipe {recipe.id}: not checked as it is now; first `fourfold recipe check --write`")
    today = datetime.date.today().isoformat()
    proofs[recipe.id][f"{engine} {version}"] = replace(proof, rehearsed=today, apart=apart, loaded=loaded)
    save(path, proofs)
    return path

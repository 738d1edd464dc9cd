"""Import a file or a folder of files, count what rotted, and write the recipes."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.importing import srt, vllm_recipes
from fourfold.common.recipe.importing.building import build
from fourfold.common.recipe.importing.reading import read
from fourfold.common.recipe.importing.result import Deployment, Imported, short
from fourfold.common.recipe.loading import Catalogue


@dataclass(frozen=True)
class Choice:
    """Which of a vllm-project file's many command lines to read."""

    gpu: str = "gb300"
    variant: str = "default"
    features: Sequence[str] = ()


@dataclass
class Collection:
    """What a folder held.

    Attributes:
        imported: a recipe for each deployment point.
        others: files that are no recipe of a known format.
        failed: file and reason, for recipes that could not be read.
    """

    imported: list[Imported] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def files(self) -> int:
        """Files that gave a recipe."""
        return len({item.source for item in self.imported})

    def counts(self) -> dict[str, dict[str, int]]:
        """By engine: files, recipes, those with old names, those that today's engines refuse, repaired, left."""
        out: dict[str, dict[str, int]] = {}
        keys = ("files", "files_refused", "recipes", "rotten", "refused", "ignored", "repaired", "left", "loads")
        files: dict[tuple[str, Path], bool] = {}
        for item in self.imported:
            (engine,) = item.data["engines"]
            row = out.setdefault(engine, dict.fromkeys(keys, 0))
            files[engine, item.source] = files.get((engine, item.source), False) or bool(item.refused)
            row["recipes"] += 1
            row["rotten"] += bool(item.rot)
            row["refused"] += bool(item.refused)
            row["ignored"] += any(rename.effect == "ignored" for _, rename in item.rot)
            row["repaired"] += item.repaired
            row["left"] += bool(item.left)
            row["loads"] += item.loads
        for (engine, _), refused in files.items():
            out[engine]["files"] += 1
            out[engine]["files_refused"] += refused
        return out

    def names(self) -> list[tuple[str, str, int]]:
        """Old name, what became of it, and how many recipes had it, the most frequent first."""
        found: Counter[tuple[str, str]] = Counter()
        for item in self.imported:
            found.update({(rename.old, rename.text.partition(" is ")[2]) for _, rename in item.rot})
        return [(old, text, count) for (old, text), count in found.most_common()]


def points(path: Path, catalogue: Catalogue, choice: Choice) -> list[Deployment] | None:
    """The deployments of a file; None: of no format that is known here.

    Raises:
        FourfoldError: it cannot be read, or a part that a recipe needs is missing.
    """
    data, twice = read(path)
    if srt.is_recipe(data):
        out = srt.read(data, path)
    elif vllm_recipes.is_recipe(data):
        out = vllm_recipes.read(data, path, catalogue, choice.gpu, choice.variant, choice.features)
    else:
        return None
    for deployment in out:
        deployment.unknown += [f"{key}: given twice; the last one counts" for key in twice]
    return out


def import_file(path: Path, catalogue: Catalogue, choice: Choice | None = None) -> list[Imported]:
    """The recipes of a file.

    Raises:
        FourfoldError: it is of no known format, or a recipe cannot be made of it.
    """
    found = points(path, catalogue, choice or Choice())
    if found is None:
        raise FourfoldError(
            f"{path}: neither srt-slurm's format (resources, backend.vllm_config or backend.sglang_config) nor "
            "vllm-project/recipes' (model.model_id, compatible_strategies)"
        )
    return confirmed([build(path, deployment, catalogue) for deployment in found], catalogue)


def import_folder(folder: Path, catalogue: Catalogue, choice: Choice | None = None) -> Collection:
    """All recipes below a folder. What fails is listed and stops nothing."""
    out = Collection()
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        if not path.is_file():
            continue
        try:
            found = points(path, catalogue, choice or Choice())
        except FourfoldError as error:
            out.failed.append(str(error).splitlines()[0])
            continue
        if found is None:
            out.others.append(path)
        for deployment in found or []:
            try:
                out.imported.append(build(path, deployment, catalogue))
            except FourfoldError as error:
                out.failed.append(f"{error} ({deployment.name})".splitlines()[0])
    confirmed(out.imported, catalogue)
    return out


def confirmed(imported: list[Imported], catalogue: Catalogue) -> list[Imported]:
    """The same, after the catalogue has really loaded the file of each whose card and sheet it knows."""
    with tempfile.TemporaryDirectory() as folder:
        for item in imported:
            if not item.loads:
                continue
            path = Path(folder) / f"{item.id}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(written(item), encoding="utf-8")
            try:
                catalogue.recipe(path)
            except FourfoldError as error:
                item.loads = False
                item.unknown.append(f"does not load yet: {str(error).splitlines()[0].removeprefix(f'{path}: ')}")
    return imported


def written(imported: Imported) -> str:
    """The recipe's file: what was not carried over is in its notes."""
    notes = [f"Imported from {imported.source.name}; not measured with the names it has now."]
    notes += [f"Renamed in {roles}: {rename.text}" for roles, rename in imported.renames()]
    notes += [f"Not carried over: {line}" for line in dict.fromkeys(imported.unknown)]
    clean = [short(note, 2000) for note in notes]
    return yaml.safe_dump({**imported.data, "notes": clean}, sort_keys=False, width=110, allow_unicode=True)


def write(imported: Sequence[Imported], out: Path, overwrite: bool = False) -> list[Path]:
    """Write every recipe below ``out``, in the folder of its model: all, or none where a file is there already.

    Raises:
        FourfoldError: a file exists, two recipes have one id, or the folder cannot be written.
    """
    texts: dict[Path, str] = {}
    for item in imported:
        path = out / f"{item.id}.yaml"
        if path in texts:
            raise FourfoldError(f"{item.source}: id {item.id}: another file has it too; import them apart")
        if path.exists() and not overwrite:
            raise FourfoldError(f"{path}: is there already; move it away, or give --overwrite")
        texts[path] = written(item)
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
    except OSError as error:
        raise FourfoldError(f"--out {out}: {error.strerror or error}") from None
    return list(texts)


def as_json(item: Imported) -> dict[str, Any]:
    """Everything of one recipe, for ``--json``."""
    return {
        "source": str(item.source),
        "id": item.id,
        "recipe": item.data,
        "rot": [{"role": role, **vars(rename)} for role, rename in item.rot],
        "refused": item.refused,
        "left": [vars(refusal) for refusal in item.left],
        "unknown": item.unknown,
        "repaired": item.repaired,
        "loads": item.loads,
    }

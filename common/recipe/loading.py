"""Recipes, model cards, hardware sheets and price sheets, and what refers to what.

``extends`` merges mappings, replaces all else, and ``null`` takes a key away. Every problem is a `FourfoldError` with
file, key, value and what was expected; nothing outside the roots and the folder of a recipe is read.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.plain_yaml import read_bytes, read_yaml
from fourfold.common.recipe.schema import NAME, RECIPE_ID, HardwareSheet, ModelCard, PriceSheet, Recipe
from fourfold.common.strict import Strict, problems

__all__ = ["Catalogue", "merged", "parse", "read_config", "read_yaml"]
LARGEST_CONFIG = 8 << 20  # bytes; those of models with a format for each layer are long

LONGEST_CHAIN = 8
FOLDERS = {"models": ModelCard, "hardware": HardwareSheet, "prices": PriceSheet}
T = TypeVar("T", bound=Strict)


def merged(base: dict[str, Any], over: dict[str, Any], nulls: bool = False) -> dict[str, Any]:
    """``over`` on top of ``base``: mappings merge, None takes a key away, all else replaces.

    Args:
        nulls: keep None; so it is below ``substitutions``, where it means something else.
    """
    out = dict(base)
    for key, value in over.items():
        if value is None and not nulls:
            out.pop(key, None)
        elif isinstance(value, dict):
            below = out.get(key)
            out[key] = merged(below if isinstance(below, dict) else {}, value, nulls or key == "substitutions")
        else:
            out[key] = value
    return out


def read_config(path: Path) -> dict[str, Any]:
    """A model's ``config.json``.

    Raises:
        FourfoldError: not readable, too large, or not a JSON object.
    """
    try:
        data = json.loads(read_bytes(path, LARGEST_CONFIG))
    except (ValueError, RecursionError) as error:
        raise FourfoldError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise FourfoldError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def parse(kind: type[T], data: Any, source: Path | str) -> T:
    """Validate ``data``.

    Raises:
        FourfoldError: one line for each problem, each with ``source``.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise FourfoldError("\n".join(f"{source}: {line}" for line in problems(error))) from None


class Catalogue:
    """All that a recipe refers to: files below ``roots``, the first root that has a name wins.

    A root holds the folders ``models``, ``hardware`` and ``prices``; every other folder's ``*.yaml`` are recipes, whose
    id is folder/name.
    """

    def __init__(self, roots: Sequence[Path] | None = None) -> None:
        self.roots = [*(roots or []), Path(str(files("fourfold.recipes")))]
        for root in self.roots:
            if not _is(root, "dir"):
                raise FourfoldError(f"catalogue {root}: not a folder; expected one with models, hardware or recipes")

    @cached_property
    def recipe_paths(self) -> dict[str, Path]:
        """Recipe id to file, in order."""
        found: dict[str, Path] = {}
        for root in self.roots:
            for path in sorted(root.glob("*/*.yaml")):
                if path.parent.name not in FOLDERS and path.is_file():
                    found.setdefault(f"{path.parent.name}/{path.stem}", path)
        return dict(sorted(found.items()))

    def recipe(self, wanted: str | Path) -> Recipe:
        """A recipe by id, or by the path of its file.

        Raises:
            FourfoldError: no such recipe, not valid, or it refers to what is not there.
        """
        path = self.find(wanted)
        recipe = parse(Recipe, self._resolved(path, ()), path)
        expected = f"{path.parent.resolve().name}/{path.stem}"
        if recipe.id != expected:
            raise FourfoldError(f"{path}: id: {recipe.id}; expected {expected}, from its folder and file name")
        card = self.model(recipe.model, f"{path}: model")
        sheet = self.hardware(recipe.hardware, f"{path}: hardware")
        for i, evidence in enumerate(recipe.evidence):
            if evidence.prices is not None:
                self.prices(evidence.prices, f"{path}: evidence.{i}.prices")
        if recipe.rehearsal and recipe.rehearsal.proxy:
            self.model(recipe.rehearsal.proxy, f"{path}: rehearsal.proxy")
        _check_fits_machine(recipe, card, sheet, path)
        return recipe

    def find(self, wanted: str | Path) -> Path:
        """The file of a recipe."""
        path = Path(wanted)
        if path.suffix in (".yaml", ".yml") and _is(path, "file"):
            return path
        if str(wanted) in self.recipe_paths:
            return self.recipe_paths[str(wanted)]
        raise FourfoldError(f"recipe {wanted}: no such file or id{nearest(str(wanted)[:200], self.recipe_paths)}")

    def model(self, name: str, source: Path | str = "model") -> ModelCard:
        """A model card."""
        card = self._sheet("models", ModelCard, name, source)
        if not _is(self.model_path(name).with_name(card.config), "file"):
            raise FourfoldError(f"{self.model_path(name)}: config: {card.config!r}; there is no such file beside it")
        return card

    def draft_models(self) -> list[ModelCard]:
        """The cards of draft models, which draft for another card's model."""
        return [card for card in map(self.model, self.names("models")) if card.drafts_for is not None]

    def config(self, name: str, source: Path | str = "model") -> dict[str, Any]:
        """The model's ``config.json``.

        Raises:
            FourfoldError: no such card, or the file beside it is not a JSON object.
        """
        return read_config(self.model_path(name).with_name(self.model(name, source).config))

    def model_path(self, name: str) -> Path:
        """The file of a model card; its config.json is beside it."""
        return next(root / "models" / f"{name}.yaml" for root in self.roots if self._file(root, "models", name))

    def hardware(self, name: str, source: Path | str = "hardware") -> HardwareSheet:
        """A hardware sheet."""
        return self._sheet("hardware", HardwareSheet, name, source)

    def prices(self, name: str, source: Path | str = "prices") -> PriceSheet:
        """A price sheet."""
        return self._sheet("prices", PriceSheet, name, source)

    def names(self, folder: str) -> list[str]:
        """The names in ``models``, ``hardware`` or ``prices``."""
        return sorted({path.stem for root in self.roots for path in (root / folder).glob("*.yaml")})

    def _file(self, root: Path, folder: str, name: str) -> bool:
        return re.match(NAME, name) is not None and _is(root / folder / f"{name}.yaml", "file")

    def _sheet(self, folder: str, kind: type[T], name: str, source: Path | str) -> T:
        for root in self.roots:
            if self._file(root, folder, name):
                path = root / folder / f"{name}.yaml"
                sheet = parse(kind, read_yaml(path), path)
                if getattr(sheet, "id") != name:  # noqa: B009
                    raise FourfoldError(f"{path}: id: {getattr(sheet, 'id')!r}; expected {name!r}")  # noqa: B009
                return sheet
        raise FourfoldError(f"{source}: no file {folder}/{name}.yaml{nearest(name, self.names(folder))}")

    def _resolved(self, path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
        """The file's mapping, with what it extends below it."""
        path = path.resolve()
        if path in chain:
            raise FourfoldError(f"{path}: extends: {' -> '.join(p.stem for p in (*chain, path))} is a cycle")
        if len(chain) >= LONGEST_CHAIN:
            raise FourfoldError(f"{path}: extends: a chain of more than {LONGEST_CHAIN} recipes")
        data = read_yaml(path)
        base = data.get("extends")
        if base is None:
            return merged({}, data)
        if not isinstance(base, str) or len(base) > 160 or not re.match(RECIPE_ID, base):
            raise FourfoldError(f"{path}: extends: {str(base)[:200]!r}; expected the id of a recipe, folder/name")
        found = self.recipe_paths.get(base)
        beside = path.parent.parent / f"{base}.yaml"
        if beside.is_file():  # a folder of recipes need not be a root
            found = beside
        if found is None:
            raise FourfoldError(f"{path}: extends: {base}: no such recipe{nearest(base, self.recipe_paths)}")
        return merged(self._resolved(found, (*chain, path)), data)


def _check_fits_machine(recipe: Recipe, card: ModelCard, sheet: HardwareSheet, path: Path) -> None:
    """Refuse parallelism that no such machine can have."""
    for engine, plan in recipe.engines.items():
        for name, role in plan.roles.items():
            where = f"{path}: engines.{engine}.roles.{name}.parallel"
            world = role.parallel.world
            if world > sheet.gpus_per_node and world % sheet.gpus_per_node:
                raise FourfoldError(
                    f"{where}: {world} GPUs; expected at most {sheet.gpus_per_node} or a multiple of it, "
                    f"the GPUs of one node of {sheet.id}"
                )
            if role.parallel.expert > max(sheet.nvlink_domain, sheet.gpus_per_node):
                raise FourfoldError(
                    f"{where}.expert: {role.parallel.expert} ranks; {sheet.id} joins {sheet.nvlink_domain} over NVLink"
                )


def _is(path: Path, kind: Literal["dir", "file"]) -> bool:
    try:
        return path.is_dir() if kind == "dir" else path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known) or 'none'}"

"""The page of all recipes: recipe x engine version x proof level, from data alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fourfold.common.recipe.check import proofs, snapshots
from fourfold.common.recipe.check.result import LEVELS
from fourfold.common.recipe.check.targets import Target
from fourfold.common.recipe.launch import is_for
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.schema import Recipe

PAGE = "README.md"
NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
MEANING = {
    "schema": "the file is valid, and what it refers to is there",
    "parser": "the engine's own argument parser takes the arguments of every role",
    "environment": "every environment variable is one that something reads",
    "configuration": "the engine resolves its configuration, from the model's config.json, on a simulated machine",
    "rules": "no cited rule of what goes wrong beyond the configuration is broken",
    "rehearsed": "a small replica ran with these roles on a CPU",
}


def page(catalogue: Catalogue, root: Path, versions: Sequence[Target] | None = None) -> str:
    """Markdown of all recipes below ``root``, a root of the catalogue.

    Args:
        versions: columns; default: the versions with a shipped snapshot.
    """
    columns = list(versions) if versions is not None else snapshots.shipped()
    known = proofs.load(root / "proofs" / "proofs.json")
    paths = {name: path for name, path in catalogue.recipe_paths.items() if root.resolve() in path.resolve().parents}
    lines = [
        "# Recipes",
        "",
        "Written by `fourfold recipe matrix --write`; do not edit. The levels are those of the last",
        "`fourfold recipe check --write`, and a recipe that has changed since shows none. Nothing here ran on the GPUs",
        "it is for: a level says what was checked without them.",
        "",
        "| level | |",
        "|---|---|",
        *(f"| L{i} {name} | {MEANING[name]} |" for i, name in enumerate(LEVELS)),
        "",
        "2w: two warnings, which `fourfold recipe check` prints. s: by a snapshot of the engine's options. ?: not",
        "checked as it is now. –: not for this engine or version.",
        "",
    ]
    header = ["recipe", "machine", *(f"{NAMES[t.engine]} {t.version}" for t in columns)]
    folder = ""
    for name, path in paths.items():
        recipe = catalogue.recipe(path)
        if name.partition("/")[0] != folder:
            folder = name.partition("/")[0]
            card = catalogue.model(recipe.model)
            lines += ["", f"## {folder}", "", f"[{card.repo}](https://huggingface.co/{card.repo})", ""]
            lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        link = f"[{path.stem}]({folder}/{path.name}): {recipe.title}".replace("|", "\\|")
        cells = [_cell(recipe, catalogue, known, target) for target in columns]
        lines.append(f"| {' | '.join([link, recipe.hardware, *cells])} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _cell(recipe: Recipe, catalogue: Catalogue, known: proofs.Proofs, target: Target) -> str:
    if not is_for(recipe, target.engine, target.version):
        return "–"
    proof = proofs.current(recipe, catalogue, known, target.engine, target.version)
    if proof is None:
        return "?"
    marks = ["s"] * (proof.by == "snapshot") + [f"{proof.warnings}w"] * bool(proof.warnings)
    marks += [f"{proof.errors} error(s)"] * bool(proof.errors)
    return " ".join([f"L{proof.shown}", *marks])

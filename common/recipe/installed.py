"""The engine of this environment, held to what a recipe is for."""

from __future__ import annotations

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.launch import engine_of, is_for
from fourfold.common.recipe.schema import Recipe
from fourfold.common.serving import installed_engine


def installed_version(recipe: Recipe, engine: str) -> str:
    """The installed engine's version.

    Raises:
        FourfoldError: this environment holds another engine, or a version outside the recipe's range.
    """
    plan = engine_of(recipe, engine)
    name, version = installed_engine()
    if name != engine:
        raise FourfoldError(f"--engine {engine}: this environment has {name} {version}; run it in {engine}'s")
    if not is_for(recipe, engine, version):
        raise FourfoldError(f"recipe {recipe.id}: is for {name} {plan.versions}; this environment has {version}")
    return version

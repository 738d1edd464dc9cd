"""L4: cited rules on what engines accept and regret later, scoped by engine and version.

A rule names the value, what was expected and the fix; its source is a file of the engine, a pull request or a page.
What an engine itself refuses at the start belongs to L1 and L3; a rule repeats it only where the refusal comes on the
GPUs, or where the recipe's own launch causes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fourfold.common.recipe.check.result import Finding
from fourfold.common.recipe.check.rules import memory, moe, sglang, speculation, transport, vllm
from fourfold.common.recipe.check.rules.case import RULES, Rule, case_of
from fourfold.common.recipe.schema import HardwareSheet, ModelCard, Recipe

__all__ = ["RULES", "Rule", "findings", "modules"]
modules = (memory, moe, sglang, speculation, transport, vllm)  # importing them fills RULES


def findings(
    recipe: Recipe,
    engine: str,
    version: str,
    card: ModelCard,
    sheet: HardwareSheet,
    config: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """What the rules say of the engine's part of a recipe.

    Args:
        version: such as ``0.32.0``.
        config: the model's ``config.json``; default: the file beside the card where the card is of the shipped ones,
            and without one the rules that need it say nothing.

    Raises:
        FourfoldError: the recipe is not for that engine, or its parallelism cannot be launched.
    """
    case = case_of(recipe, engine, version, card, sheet, config)
    return [
        Finding(4, rule.severity, where, f"{rule.id}: {message}", f"{engine} {version}", rule.source)
        for rule in RULES
        if rule.holds_for(engine, case.version)
        for where, message in dict.fromkeys(rule.look(case))  # once, where roles share an option
    ]

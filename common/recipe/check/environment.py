"""L2: is each environment variable one that something reads?

A variable with an engine's prefix that the engine's table lacks is dead: the engine starts, and what the recipe wanted
is silently off. Variables of other libraries are looked up in ``libraries.json``, each list with its source, and in
what the engine's own sources read.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fourfold.common.recipe.check.result import Finding
from fourfold.common.recipe.check.snapshots import FOLDER

PREFIXES = {"vllm": ("VLLM_",), "sglang": ("SGLANG_", "SGL_")}
FOURFOLD = {"FOURFOLD_CONFIG", "FOURFOLD_CACHE", "FOURFOLD_CPU_ISA", "FOURFOLD_DISABLE", "FOURFOLD_METRICS_DIR"}
TABLES = {"vllm": "environment_variables in vllm/envs.py", "sglang": "Envs in sglang/srt/environ.py"}


@lru_cache(maxsize=1)
def libraries() -> dict[str, dict[str, Any]]:
    """Library to its ``source`` and ``names``."""
    return json.loads((FOLDER / "libraries.json").read_text())["libraries"]


def findings(engine: str, label: str, env: Mapping[str, str], facts: Mapping[str, Any]) -> list[Finding]:
    """Dead, deprecated and unknown variables.

    Args:
        env: variable to the path in the recipe that sets it.
        facts: ``env``, ``deprecated_env`` and ``read`` of the engine or of its snapshot.
    """
    known, read, deprecated = set(facts["env"]), set(facts["read"]), facts["deprecated_env"]
    named = {name for library in libraries().values() for name in library["names"]}
    out = []
    for name, where in env.items():
        if name in deprecated:
            out.append(Finding(2, "warning", where, f"deprecated: {deprecated[name]}", label, TABLES[engine]))
        elif name in known or name in read or name in FOURFOLD or name in named:
            continue
        elif name.startswith(PREFIXES[engine]):
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
            hint = f"; the nearest is {near[0]}" if near else ""
            message = f"dead: {label} knows no {name} and ignores it{hint}"
            out.append(Finding(2, "error", where, message, label, TABLES[engine]))
        else:
            message = f"unknown: neither {label} nor a library that fourfold knows reads {name}"
            out.append(Finding(2, "warning", where, message, label, "recipes/snapshots/libraries.json"))
    return out

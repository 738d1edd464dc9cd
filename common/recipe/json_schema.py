"""The JSON Schemas of the files, for editors: completion, descriptions and errors while typing.

They cannot say all that the command checks (what refers to what, sums over fields); the command decides.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.schema import HardwareSheet, ModelCard, PriceSheet, Recipe
from fourfold.common.recipe.values import DERIVED, OPTION, VARIABLE
from fourfold.common.strict import Strict

KINDS: Mapping[str, type[Strict]] = {
    "recipe": Recipe,
    "model": ModelCard,
    "hardware": HardwareSheet,
    "prices": PriceSheet,
}
PART = "PartOf"  # before the name of what may be left to the recipe that is extended
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(kind: str) -> dict[str, Any]:
    """The schema of a kind of file, JSON Schema 2020-12.

    A recipe that extends another need not hold what the other has, and null takes away what it has.

    Raises:
        FourfoldError: no such kind.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}"
        raise FourfoldError(f"schema of {kind!r}: no such kind of file; {hint}")
    whole = KINDS[kind].model_json_schema(by_alias=True)
    if kind != "recipe":
        return {"$schema": DIALECT, **whole}
    definitions = whole.pop("$defs")
    for part in definitions.values():
        _name_keys(part)
    definitions["Recipe"] = whole
    parts = {f"{PART}{name}": _part(copy.deepcopy(schema)) for name, schema in definitions.items()}
    parts[f"{PART}Recipe"]["required"] = ["schema", "id", "extends"]
    return {
        "$schema": DIALECT,
        "title": whole["title"],
        "description": whole["description"],
        "if": {"required": ["extends"], "properties": {"extends": {"type": "string"}}},
        "then": {"$ref": f"#/$defs/{PART}Recipe"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": definitions | parts,
    }


def _part(schema: Any) -> Any:
    """The same where nothing is required and each key may be null; a list replaces, so its items stay whole."""
    if not isinstance(schema, dict):
        return [_part(item) for item in schema] if isinstance(schema, list) else schema
    out = {key: value if key == "items" else _part(value) for key, value in schema.items() if key != "required"}
    if isinstance(schema.get("$ref"), str):
        out["$ref"] = schema["$ref"].replace("#/$defs/", f"#/$defs/{PART}")
    if isinstance(schema.get("properties"), dict):
        out["properties"] = {
            name: {"anyOf": [_part(value), {"type": "null"}]} for name, value in schema["properties"].items()
        }
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = {"anyOf": [_part(schema["additionalProperties"]), {"type": "null"}]}
    return out


def _name_keys(part: dict[str, Any]) -> None:
    """What the keys of arguments and variables may be; derived options are refused where every engine derives them."""
    always = sorted(frozenset.intersection(*DERIVED.values()))
    fields = part.get("properties", {})
    if "args" in fields:
        fields["args"]["propertyNames"] = {"pattern": f"^{OPTION.pattern}$", "not": {"enum": always}}
    if "env" in fields:
        fields["env"]["propertyNames"] = {"pattern": f"^{VARIABLE.pattern}$"}

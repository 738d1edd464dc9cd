"""The base of every typed object that a user writes: unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

UNKNOWN = "unknown key"


class Strict(BaseModel):
    """Immutable; no value is converted to another type; aliases are what a file says where a name is not a word."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            valid = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in valid and key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
                    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
                    raise ValueError(f"{UNKNOWN} {str(key)[:80]!r}; {hint}")
        return data


def problems(error: ValidationError) -> list[str]:
    """One line for each problem: where, what was expected, what was found."""
    out = []
    for item in error.errors():
        loc = [str(part) for part in item["loc"]]
        where = ".".join(loc[:-1] if loc[-1:] == ["[key]"] else loc)  # a key of the wrong kind: it ends the path itself
        text = item["msg"].removeprefix("Value error, ")
        given = repr(item["input"])
        shown = (
            ""
            if text.startswith(UNKNOWN) or item["type"] == "missing"
            else f" (got {given if len(given) <= 200 else given[:200] + '...'})"
        )
        out.append(f"{where + ': ' if where else ''}{text}{shown}")
    return out

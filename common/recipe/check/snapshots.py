"""Options and variables of engine versions, as files: for a check where no engine is installed.

``fourfold recipe snapshot`` writes one from the real engine: every long option with what it takes, the kind of its
value, its choices and, where it takes a mapping, the keys; every environment variable of its table; variables that its
sources read beside. What a snapshot cannot say (does a converter take this value, do options fit each other) only the
engine can.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check.asking import ask
from fourfold.common.recipe.check.targets import Target

SCHEMA = "fourfold/snapshot/1"
FOLDER = Path(str(files("fourfold.recipes"))) / "snapshots"


def shipped() -> list[Target]:
    """The versions that there are snapshots of."""
    names = sorted(path.stem for path in FOLDER.glob("*-*.json"))
    return [Target(engine, version) for engine, _, version in (name.partition("-") for name in names)]


@lru_cache(maxsize=16)
def load(engine: str, version: str) -> dict[str, Any] | None:
    """The snapshot of an engine's version; None: there is none.

    Raises:
        FourfoldError: the file is not a snapshot.
    """
    path = FOLDER / f"{engine}-{version}.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise FourfoldError(f"{path}: not JSON: {error}") from None
    if data.get("schema") != SCHEMA:
        raise FourfoldError(f"{path}: schema {data.get('schema')!r}; expected {SCHEMA!r}")
    return data


def take(target: Target) -> dict[str, Any]:
    """A snapshot of an engine that is installed here.

    Raises:
        FourfoldError: it cannot be asked.
    """
    answers = ask(target, [], facts={"all": True})
    if answers.fatal or not answers.facts:
        raise FourfoldError(f"{target.label}: {answers.fatal or 'gave no facts'}\n{answers.log[-2000:]}")
    return {"schema": SCHEMA, "engine": target.engine, "version": target.version, **answers.facts}


def text(snapshot: Mapping[str, Any]) -> str:
    """A snapshot as a file: one option to a line, so that versions can be compared."""
    lines = [f' "{key}": {json.dumps(snapshot[key])}' for key in ("schema", "engine", "version")]
    for key in ("env", "read"):
        lines.append(f' "{key}": {json.dumps(snapshot[key], indent=0)}')
    lines.append(f' "deprecated_env": {json.dumps(snapshot["deprecated_env"], indent=0)}')
    options = [f'  "{name}": {json.dumps(fact)}' for name, fact in snapshot["options"].items()]
    lines.append(' "options": {\n' + ",\n".join(options) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def refusals(
    snapshot: Mapping[str, Any], options: Mapping[str, Sequence[str]], values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What the engine's parser would refuse, as far as a snapshot shows; as `probe.parsed` says it."""
    known: Mapping[str, Any] = snapshot["options"]
    out: list[dict[str, Any]] = []
    for name, arguments in options.items():
        flag = arguments[0].lstrip("-").replace("_", "-") if snapshot["engine"] == "vllm" else arguments[0].lstrip("-")
        path, _, key = flag.partition(".")
        fact = known.get(flag) or known.get(path if key else flag)
        if fact is None:
            longer = [option for option in known if option.startswith(flag)]
            if len(longer) == 1:
                continue
            about = "could be " + ", ".join(longer) if longer else _nearest(flag, known)
            out.append({"option": name, "message": f"unrecognized arguments: --{flag}{'; ' + about if about else ''}"})
        else:
            problem = _problem(fact, arguments[1:], values.get(name))
            if problem:
                out.append({"option": name, "message": f"argument --{flag}: {problem}"})
    return out


def _problem(fact: Mapping[str, Any], given: Sequence[str], value: Any) -> str | None:
    takes = fact["takes"]
    if takes == "none" and given:
        return f"ignored explicit argument {given[0]!r}: it takes no value"
    if takes in ("one", "many") and not given:
        return "expected an argument"
    if takes in ("one", "optional") and len(given) > 1:
        return f"expected one value, got {len(given)}"
    choices: Sequence[str] = fact.get("choices") or ()
    for item in given if choices else ():
        if item not in choices:
            return f"invalid choice: {item!r} (choose from {', '.join(choices)})"
    if isinstance(value, dict) and fact.get("keys"):
        return _unknown_key(value, fact["keys"])
    convert = {"int": int, "float": float, "json": json.loads}.get(fact.get("kind", ""))
    for item in given:
        if convert is None or choices:
            break
        try:
            convert(item)
        except ValueError:
            return f"invalid {fact['kind']} value: {item!r}"
    return None


def _unknown_key(value: Mapping[str, Any], keys: Mapping[str, Any], where: str = "") -> str | None:
    for key, inner in value.items():
        if key not in keys:
            return f"unknown key {where}{key}{_nearest(key, keys, '; did you mean ')}"
        if isinstance(inner, dict) and isinstance(keys[key], dict):
            found = _unknown_key(inner, keys[key], f"{where}{key}.")
            if found:
                return found
    return None


def _nearest(name: str, known: Mapping[str, Any], before: str = "did you mean ") -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"{before}{near[0]}?" if near else ""


def abbreviated(snapshot: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Options that are only the beginning of another one's name, which it is."""
    known, out = snapshot["options"], {}
    for name in names:
        longer = [option for option in known if option.startswith(name)]
        if name not in known and len(longer) == 1:
            out[name] = longer[0]
    return out

"""A recipe of ours from a deployment: parallelism out of flags, today's names, and a list of what has no place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from fourfold.common.recipe.check import snapshots
from fourfold.common.recipe.check.renames import WHOLE, as_mapping, renamed, suggestions
from fourfold.common.recipe.check.result import Rename
from fourfold.common.recipe.importing.result import Deployment, Imported, Refusal, Server, short
from fourfold.common.recipe.launch import flags
from fourfold.common.recipe.loading import Catalogue, parse
from fourfold.common.recipe.schema import Recipe
from fourfold.common.recipe.values import DERIVED, check_arguments, check_variables

VERSIONS = {"vllm": ("0.32.0", "0.33.0"), "sglang": ("0.5.23",)}
FOR = {"vllm": ">=0.32,<0.34", "sglang": "==0.5.23"}
# Say where a process is, which a recipe leaves to the launch.
PLACES = {"host", "port", "model", "model-path", "nnodes", "node-rank", "master-addr", "master-port", "headless"} | {
    "dist-init-addr", "disaggregation-mode", "data-parallel-address", "data-parallel-rpc-port"
} | {"data-parallel-size-local", "data-parallel-start-rank"}  # fmt: skip
BALANCED = ("data-parallel-hybrid-lb", "data-parallel-external-lb")
DP_ATTENTION = Rename(
    "option", "enable-dp-attention", "attn-dp-size", None, "deprecated", "removed after 2026-12-31", "server_args.py"
)


def build(source: Any, deployment: Deployment, catalogue: Catalogue) -> Imported:
    """The recipe, with renames made.

    Raises:
        FourfoldError: it is not a valid recipe even so; the message names the field.
    """
    engine, unknown = deployment.engine, list(deployment.unknown)
    rot: list[tuple[str, Rename]] = []
    roles: dict[str, dict[str, Any]] = {}
    refused: set[str] = set()
    left: list[Refusal] = []
    method: dict[str, Any] | None = None
    for server in deployment.servers:
        options, env = _plain(engine, server, unknown)
        for version in VERSIONS[engine]:
            if _refusals(engine, version, options):
                refused.add(f"{engine} {version}")
        parallel, replicas = _parallel(engine, server, options, unknown, rot)
        changes = _suggested(engine, options, env)
        rot += [(server.role, rename) for rename in changes]
        _note_conflicts(server.role, options, changes, unknown)
        options, env = renamed(options, env, changes)
        for version in VERSIONS[engine]:
            found = _refusals(engine, version, options)
            left += [Refusal(f"{engine} {version}", f"{server.role}.{name}", why) for name, why in found.items()]
        method = _speculation(engine, options) or method
        role = {"replicas": replicas, "parallel": parallel, "args": options, "env": env}
        roles[server.role] = {key: value for key, value in role.items() if value not in ({}, 1)}
    data = _recipe(deployment, catalogue, roles, method, unknown)
    recipe = parse(Recipe, data, source)
    loads = _known(catalogue.names("models"), recipe.model, "models", unknown)
    loads &= _known(catalogue.names("hardware"), recipe.hardware, "hardware", unknown)
    return Imported(source, data, rot, sorted(refused), left, unknown, loads)


def _plain(engine: str, server: Server, unknown: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and environment in canonical form: names with hyphens, JSON text as mappings, ``no-`` as false."""
    options: dict[str, Any] = {}
    places = []
    for written, value in server.options.items():
        head, dot, tail = str(written).lstrip("-").partition(".")
        name = head.replace("_", "-") + dot + tail
        if engine == "vllm" and name.startswith("no-") and isinstance(value, bool):
            name, value = name.removeprefix("no-"), not value
        elif value is False or value is None:  # their launchers leave these out
            continue
        reason = (
            f"an option of Dynamo, not of {engine}"
            if name.startswith("dyn-")
            else _problem(check_arguments, name, value)
        )
        if name.partition(".")[0] in PLACES:
            places.append(name)
            continue
        if reason:
            unknown.append(f"{server.role}: {name}: {reason}")
        elif tail and tail.replace("_", "a").isalnum():
            options[head.replace("_", "-")] = {**(as_mapping(options.get(head.replace("_", "-"))) or {}), tail: value}
        else:
            options[name] = as_mapping(value) or value
    if places:
        unknown.append(f"{server.role}: {', '.join(places)}: follow from the launch")
    env: dict[str, Any] = {}
    for name, value in server.env.items():
        text = str(value)
        reason = "of Dynamo" if str(name).startswith("DYN_") else _problem(check_variables, str(name), text)
        if reason:
            unknown.append(f"{server.role}: environment {name}: {reason}")
        elif "$" in text or "{" in text and not text.lstrip().startswith(("{", "[")):
            unknown.append(
                f"{server.role}: environment {name}={short(text, 80)}: a place that only their launcher fills in"
            )
        else:
            env[name] = value if isinstance(value, (int, float)) and not isinstance(value, bool) else text
    return options, env


def _problem(check: Callable[[dict[str, Any]], object], name: str, value: Any) -> str | None:
    """Why a recipe may not say this; None: it may."""
    try:
        check({name: value})
    except ValueError as error:
        return short(error, 300)
    return None


def _parallel(
    engine: str, server: Server, options: dict[str, Any], unknown: list[str], rot: list[tuple[str, Rename]]
) -> tuple[dict[str, int], int]:
    """Take the flags of parallelism out of the options; ranks and replicas."""

    def take(*names: str) -> int:
        value = next((options.pop(name) for name in names if name in options), 1)
        for name in names:
            options.pop(name, None)
        if isinstance(value, str) and WHOLE.fullmatch(value):
            value = int(value)
        if not isinstance(value, int) or value < 1:
            unknown.append(f"{server.role}: {names[0]}: {short(value)!r}; 1 is written")
            return 1
        return value

    replicas = server.replicas
    pipeline = take("pipeline-parallel-size", "pp-size")
    if engine == "vllm":
        tensor, data = take("tensor-parallel-size"), take("data-parallel-size")
        context = take("decode-context-parallel-size")
        expert = tensor * data if options.pop("enable-expert-parallel", False) is True else 1
        for name in BALANCED:
            if options.pop(name, None):
                unknown.append(f"{server.role}: {name}: here the first node balances over all ranks")
    else:
        wide, data = take("tp-size", "tensor-parallel-size"), take("attn-dp-size", "dp-size", "data-parallel-size")
        asked, context = take("ep-size", "expert-parallel-size"), take("dcp-size", "decode-context-parallel-size")
        if options.pop("enable-dp-attention", False):
            rot.append((server.role, DP_ATTENTION))
        elif data > 1:
            unknown.append(f"{server.role}: {data} data-parallel copies without dp attention: written as replicas")
            replicas, data = replicas * data, 1
        if wide % data:
            unknown.append(f"{server.role}: {data} data-parallel ranks of {wide}: no divisor; 1 is written")
            data = 1
        tensor = wide // data
        expert = wide if asked == wide or options.get("moe-a2a-backend") in ("deepep", "megamoe") else 1
        if asked not in (1, wide):
            unknown.append(f"{server.role}: expert-parallel-size {asked} of {wide} ranks: {expert} is written")
    world = tensor * data * pipeline
    if server.gpus is not None and server.gpus != world:
        unknown.append(f"{server.role}: {server.gpus} GPUs of a worker, and its flags start {world} ranks")
    for name in DERIVED[engine] & set(options):
        unknown.append(f"{server.role}: {name}: {short(options.pop(name))}: follows from parallelism or the launch")
    ranks = {"tensor": tensor, "data": data, "expert": expert, "pipeline": pipeline, "context": context}
    return {key: value for key, value in ranks.items() if value != 1}, replicas


def _suggested(engine: str, options: Mapping[str, Any], env: Mapping[str, Any]) -> list[Rename]:
    out: list[Rename] = []
    for version in VERSIONS[engine]:
        out += [rename for rename in suggestions(engine, version, options, env) if rename not in out]
    return out


def _note_conflicts(role: str, options: Mapping[str, Any], changes: list[Rename], unknown: list[str]) -> None:
    for rename in changes:
        there = options.get(rename.new or "")
        if rename.kind == "env_to_option" and there not in (None, rename.value):
            unknown.append(f"{role}: {rename.old} asks for {rename.new}: {rename.value}; its {short(there)!r} stays")


def judges(engines: Iterable[str]) -> list[str]:
    """What says whether an engine's version takes a setting: its snapshot, or the rename table where there is none."""
    return [
        f"{'the snapshot' if snapshots.load(engine, version) else 'the rename table alone'} of {engine} {version}"
        for engine in engines
        for version in VERSIONS[engine]
    ]


def _refusals(engine: str, version: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Option to what is wrong with it: by the shipped snapshot, without one by the rename table."""
    known = snapshots.load(engine, version)
    if known is None:
        found = suggestions(engine, version, options, {})
        return {rename.old: rename.text for rename in found if rename.effect == "refused"}
    own = {name: value for name, value in options.items() if name not in DERIVED[engine] and value is not False}
    arguments = {name: flags(engine, {name: value}) for name, value in own.items()}
    found = {str(item["option"]): str(item["message"]) for item in snapshots.refusals(known, arguments, own)}
    # A snapshot tells converters by samples; one that takes "auto" or JSON besides looks like a plain number's.
    return {name: why for name, why in found.items() if not re.search(r": invalid (int|float) value", why)}


def _speculation(engine: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    if engine == "vllm":
        config = as_mapping(options.get("speculative-config")) or {}
        method, tokens = str(config.get("method", "")), config.get("num_speculative_tokens")
        draft = config.get("model")
    else:
        method = str(options.get("speculative-algorithm", "")).lower()
        tokens = options.get("speculative-num-steps", options.get("speculative-dspark-block-size"))
        draft = options.get("speculative-draft-model-path")
    method = {"eagle": "mtp", "nextn": "mtp"}.get(method, method)
    if method not in ("mtp", "dspark", "eagle3", "dflash", "ngram") or not isinstance(tokens, int) or tokens < 1:
        return None
    return {"method": method, "tokens": tokens, **({"draft_model": draft} if isinstance(draft, str) else {})}


def _recipe(
    deployment: Deployment,
    catalogue: Catalogue,
    roles: dict[str, dict[str, Any]],
    method: dict[str, Any] | None,
    unknown: list[str],
) -> dict[str, Any]:
    model = _card(deployment, catalogue)
    work: dict[str, Any] = {"kind": deployment.kind}
    if deployment.input_tokens is None or deployment.output_tokens is None:
        unknown.append("workload: no lengths given; 8192 tokens in and 1024 out are written")
    work["input_tokens"] = deployment.input_tokens or 8192
    work["output_tokens"] = deployment.output_tokens or 1024
    if deployment.concurrency:
        work["concurrency"] = deployment.concurrency
    plan: dict[str, Any] = {"versions": FOR[deployment.engine]}
    _share(roles, plan)
    plan["roles"] = roles
    if deployment.router:
        plan["router"] = deployment.router
    if deployment.image:
        unknown.append(f"image: {deployment.image}: pinned for the old names; choose one of a version that this is for")
    hardware = next((n for n in catalogue.names("hardware") if n.partition("-")[0] == deployment.gpu.lower()), None)
    return {
        "schema": "fourfold/recipe/1",
        "id": f"{model}/{slug(deployment.name)}",
        "title": f"{deployment.models[0] if deployment.models else model}, {deployment.name}, imported"[:2000],
        "model": model,
        "hardware": hardware or slug(deployment.gpu),
        "workload": work,
        "engines": {deployment.engine: plan},
        **({"speculation": method} if method else {}),
    }


def _share(roles: dict[str, dict[str, Any]], plan: dict[str, Any]) -> None:
    """Move what all roles have in common up to the engine."""
    if len(roles) < 2:
        return
    for part in ("args", "env"):
        first, *others = [role.get(part, {}) for role in roles.values()]
        same = {
            key: value
            for key, value in first.items()
            if all(key in other and other[key] == value and type(other[key]) is type(value) for other in others)
        }
        if same:
            plan[part] = same
        for role in roles.values():
            own = {key: value for key, value in role.get(part, {}).items() if key not in same}
            role.pop(part, None)
            if own:
                role[part] = own


def _card(deployment: Deployment, catalogue: Catalogue) -> str:
    """The id of the model's card, or one made from its name."""
    repos = _repositories(catalogue)
    for name in deployment.models:
        if name.lower() in repos:
            return repos[name.lower()]
        if slug(name.rpartition("/")[2]) in repos.values():
            return slug(name.rpartition("/")[2])
    return slug(deployment.models[0].rpartition("/")[2]) if deployment.models else "unnamed"


@lru_cache(maxsize=4)
def _repositories(catalogue: Catalogue) -> dict[str, str]:
    """Repository of the weights, in small letters, to the model card's id."""
    return {catalogue.model(name).repo.lower(): name for name in catalogue.names("models")}


def _known(names: list[str], name: str, folder: str, unknown: list[str]) -> bool:
    if name not in names:
        unknown.append(f"{folder}/{name}.yaml: there is none yet, and the recipe needs it to load")
    return name in names


def slug(text: str) -> str:
    """Text as a name of ours: small letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "unnamed"

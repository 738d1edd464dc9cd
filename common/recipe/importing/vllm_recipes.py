"""vllm-project/recipes: one model's file, with variants, strategies and overrides for kinds of hardware.

A file stands for hundreds of command lines. Read here is one variant with its opt-out features, on one machine, under
each strategy that the machine can have. Later arguments replace earlier ones: the model's, the variant's, the
strategy's, the hardware's (a strategy's own in place of the model's and the variant's), the features'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check.renames import WHOLE
from fourfold.common.recipe.importing.result import Deployment, Server, short
from fourfold.common.recipe.loading import Catalogue

GENERATIONS = {"gb300": "blackwell", "gb200": "blackwell", "b300": "blackwell", "b200": "blackwell", "h200": "hopper"}
STRATEGIES = tuple(f"single_node_{kind}" for kind in ("tp", "tep", "dep")) + ("pd_cluster",)
STRATEGIES += tuple(f"multi_node_{kind}" for kind in ("tp", "tep", "dep", "tp_pp", "tp_dp"))
TRANSFER = {"kv_connector": "NixlConnector", "kv_load_failure_policy": "fail"}
# Parts that say nothing of a launch.
PROSE = {"meta", "guide", "dependencies", "kv_offload_support", "hardware_notes", "default_strategy", "opt_in_features"}


def is_recipe(data: dict[str, Any]) -> bool:
    """Whether a file has the shape of vllm-project/recipes."""
    model = data.get("model")
    return isinstance(model, dict) and "model_id" in model and "compatible_strategies" in data


def read(
    data: dict[str, Any],
    path: Path,
    catalogue: Catalogue,
    gpu: str = "gb300",
    variant: str = "default",
    features: Sequence[str] = (),
) -> list[Deployment]:
    """The deployments of one variant on one machine, with the features that are on by default and those asked for.

    Raises:
        FourfoldError: no such variant or machine, a part of the wrong type, or a model for another server.
    """
    if gpu not in GENERATIONS:
        raise FourfoldError(f"--hardware {gpu}: expected one of {', '.join(GENERATIONS)}")
    if data.get("omni") is not None:
        raise FourfoldError(f"{path}: omni: made for vllm-omni, whose options vllm does not have")
    variants = _mapping(data, "variants", path)
    chosen = variants.get(variant)
    if not isinstance(chosen, dict):
        raise FourfoldError(f"{path}: variants: no {variant!r}; there are {short(', '.join(map(str, variants)))}")
    sheet = next(catalogue.hardware(n) for n in catalogue.names("hardware") if n.partition("-")[0] == gpu)
    strategies, optional = data.get("compatible_strategies"), data.get("opt_in_features") or []
    if not isinstance(optional, list):
        raise FourfoldError(f"{path}: opt_in_features: {short(optional)}; expected a list")
    skip = {str(name) for name in optional} - set(features)
    out = []
    for strategy in strategies if isinstance(strategies, list) else []:
        if strategy in STRATEGIES:
            out.append(
                _deployment(data, chosen, str(strategy), path, gpu, sheet.gpus_per_node, sheet.memory_bytes, skip)
            )
    if not out:
        raise FourfoldError(
            f"{path}: compatible_strategies: {short(strategies)}; expected one of {', '.join(STRATEGIES)}"
        )
    unread = [f"compatible_strategies: {name}" for name in strategies or [] if name not in STRATEGIES]
    unread += [f"features.{name}: opt-in; --feature {name} adds it" for name in sorted(skip)]
    unread += [f"variants.{name}: --variant {name} reads it" for name in variants if name != variant]
    known = {"model", "features", "variants", "compatible_strategies", "hardware_overrides", "strategy_overrides"}
    unread += [f"{key}: not read" for key in data if key not in known | PROSE]
    out[0].unknown += unread
    return out


def _deployment(
    data: dict[str, Any],
    chosen: dict[str, Any],
    strategy: str,
    path: Path,
    gpu: str,
    gpus: int,
    memory: int,
    skip: set[str],
) -> Deployment:
    model = _mapping(data, "model", path)
    override = _optional(_optional(data, "strategy_overrides", path), strategy, path)
    unknown: list[str] = []
    servers = []
    roles: tuple[Literal["prefill", "decode", "aggregated"], ...] = (
        ("prefill", "decode") if strategy == "pd_cluster" else ("aggregated",)
    )
    needed = chosen.get("vram_minimum_gb")
    fits = isinstance(needed, (int, float)) and needed * 10**9 <= gpus * memory
    nodes = 1 if strategy.startswith("single_node") or (fits and strategy == "pd_cluster") else 2
    for role in roles:
        part = _optional(override, role, path) if role != "aggregated" else {}
        count = part.get("nodes", nodes)
        if isinstance(count, dict):
            count = count.get(gpu, count.get("default", nodes))
        if not isinstance(count, int) or isinstance(count, bool) or not 0 < count < 1024:
            raise FourfoldError(
                f"{path}: strategy_overrides.{strategy}.{role}.nodes: {short(count)!r}; expected a number"
            )
        layers = [
            model.get("base_args"),
            chosen.get("extra_args"),
            override.get("extra_args"),
            override.get("vllm_args"),
        ]
        layers += [part.get("extra_args"), part.get("vllm_args")]
        layers += _hardware(data, chosen, override, part, gpu, path, "extra_args")
        layers += _features(data, chosen, gpu, path, strategy, skip)
        options: dict[str, Any] = {}
        for layer in layers:
            options.update(_options(layer, path, unknown, role))
        if role != "aggregated":
            transfer = {**TRANSFER, "kv_role": "kv_producer" if role == "prefill" else "kv_consumer"}
            options.setdefault("kv-transfer-config", transfer)
        options.update(_ranks(strategy, str(part.get("parallelism", "tp")), part, override, chosen, gpus, count))
        env: dict[str, Any] = {}
        for layer in (
            model.get("base_env"),
            chosen.get("extra_env"),
            override.get("env"),
            override.get("extra_env"),
            part.get("env"),
            *_hardware(data, chosen, override, part, gpu, path, "extra_env"),
        ):
            env.update(layer if isinstance(layer, dict) else {})
        servers.append(Server(role, options, env))
    name = str(chosen.get("model_id") or model["model_id"])
    return Deployment(f"{gpu}-{strategy.replace('_', '-')}", "vllm", [name], gpu, servers, kind="chat", unknown=unknown)


def _ranks(
    strategy: str,
    pool: str,
    part: dict[str, Any],
    override: dict[str, Any],
    chosen: dict[str, Any],
    node: int,
    nodes: int,
) -> dict[str, Any]:
    """The flags of parallelism over ``nodes`` of ``node`` GPUs; an explicit ``tp`` wins where theirs does."""
    kind = pool if strategy == "pd_cluster" else strategy.rpartition("_")[2]
    gpus = node * nodes
    if kind == "pp":
        return {"tensor-parallel-size": node, "pipeline-parallel-size": nodes}
    if kind == "dp":
        return {"tensor-parallel-size": node, "data-parallel-size": nodes}
    tensor = part.get("tp", override.get("tp", chosen.get("tp")))
    wanted = tensor if isinstance(tensor, int) and 0 < tensor <= gpus else None
    if kind == "dep":
        each = (wanted or 1) if strategy == "pd_cluster" else 1
        return {"tensor-parallel-size": each, "data-parallel-size": gpus // each, "enable-expert-parallel": True}
    ranks = (wanted or gpus) if strategy == "single_node_tp" else gpus
    return {"tensor-parallel-size": ranks, **({"enable-expert-parallel": True} if kind == "tep" else {})}


def _hardware(
    data: dict[str, Any],
    chosen: dict[str, Any],
    override: dict[str, Any],
    part: dict[str, Any],
    gpu: str,
    path: Path,
    key: str,
) -> list[Any]:
    """The layers of a machine: a strategy's own for its generation stand in place of the model's and the variant's."""
    keys = (GENERATIONS[gpu], "nvidia")

    def of(owner: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        there = _optional(owner, "hardware_overrides", path)
        return next((there[name] for name in names if isinstance(there.get(name), dict)), {})

    own = of(override, keys)
    layers = [own] if own else [of(data, keys), of(chosen, keys)]
    layers += [of(chosen, (gpu,)), of(override, (gpu,)), of(part, (gpu,))]
    return [layer.get(key) for layer in layers]


def _features(
    data: dict[str, Any], chosen: dict[str, Any], gpu: str, path: Path, strategy: str, skip: set[str]
) -> list[Any]:
    """Arguments of the features that are wanted."""
    out: list[Any] = []
    for name, feature in _optional(data, "features", path).items():
        if name in skip or not isinstance(feature, dict) or strategy not in feature.get("strategies", [strategy]):
            continue
        modes = feature.get("modes")
        if isinstance(modes, dict) and modes:
            wanted = _optional(chosen, "default_modes", path).get(name, feature.get("default_mode"))
            feature = modes.get(wanted, next(iter(modes.values())))
            if not isinstance(feature, dict):
                continue
        there = _optional(feature, "hardware_overrides", path)
        own = there.get(gpu) or there.get(GENERATIONS[gpu]) or there.get("nvidia")
        out.append(own["args"] if isinstance(own, dict) and "args" in own else feature.get("args"))
    return out


def _options(layer: Any, path: Path, unknown: list[str], role: str) -> dict[str, Any]:
    """A list of arguments as options. A value that is missing makes a flag."""
    if layer is None:
        return {}
    if not isinstance(layer, list):
        raise FourfoldError(f"{path}: {short(layer)}; expected a list of arguments")
    words = [word if isinstance(word, str) else str(word) for word in layer]
    out: dict[str, Any] = {}
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("-"):
            unknown.append(f"{role}: {short(word, 80)}: a value without an option")
            continue
        if " " in word and "=" not in word.partition(" ")[0]:
            unknown.append(
                f"{role}: {short(word, 80)}: an option and its value in one word, which no parser splits; split here"
            )
            word, _, rest = word.partition(" ")
            words.insert(i, rest.strip())
        name, equals, value = word.lstrip("-").partition("=")
        values = [value] if equals else []
        while not equals and i < len(words) and not _is_option(words[i]):
            values.append(words[i])
            i += 1
        name = {"cc": "compilation-config", "tp": "tensor-parallel-size"}.get(name, name)
        name = f"compilation-config.{name[3:]}" if name.startswith("cc.") else name
        out[name] = True if not values else _value(values[0]) if len(values) == 1 else [_value(v) for v in values]
    return out


def _is_option(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit()


def _value(text: str) -> Any:
    if WHOLE.fullmatch(text):
        return int(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _mapping(data: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise FourfoldError(f"{path}: {key}: {short(value)}; expected a mapping")
    return value


def _optional(data: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    return {} if data.get(key) is None else _mapping(data, key, path)

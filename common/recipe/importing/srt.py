"""srt-slurm's YAML, as InferenceX has it too: one deployment, or a base with overrides, zipped ones among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check.renames import WHOLE
from fourfold.common.recipe.importing.result import Deployment, Server, short
from fourfold.common.recipe.loading import merged

ROLES: dict[Literal["prefill", "decode", "aggregated"], str] = {
    "prefill": "prefill",
    "decode": "decode",
    "aggregated": "agg",
}
CONNECTORS = {"nixl": "NixlConnector", "lmcache": "LMCacheConnectorV1"}
VARIANTS = 64  # of one file


def is_recipe(data: dict[str, Any]) -> bool:
    """Whether a file has srt-slurm's shape."""
    inner = data.get("base", data)
    return isinstance(inner, dict) and isinstance(inner.get("backend"), dict) and "resources" in inner


def read(data: dict[str, Any], path: Path) -> list[Deployment]:
    """The deployments of a file.

    Raises:
        FourfoldError: a part that a recipe needs is missing or of another type, or the engine is neither of ours.
    """
    return [_deployment(point, path, suffix) for suffix, point in _points(data, path)]


def _points(data: dict[str, Any], path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Suffix and whole mapping of each variant; a base is only a point where there is no variant."""
    if "base" not in data:
        return [("", data)]
    base = _mapping(data, "base", path)
    out: list[tuple[str, dict[str, Any]]] = []
    for key in data:
        if key.startswith("override_"):
            out.append((key.removeprefix("override_"), merged(base, _mapping(data, key, path))))
        elif key.startswith("zip_override_"):
            over = _mapping(data, key, path)
            lengths = {length for length in _lengths(over) if length != 1}
            if len(lengths) > 1 or 0 in lengths:
                raise FourfoldError(f"{path}: {key}: lists of {sorted(lengths)} values; expected one length, or 1")
            count = max(lengths, default=1)
            name = key.removeprefix("zip_override_")
            if count > VARIANTS:
                raise FourfoldError(f"{path}: {key}: {count} variants; expected at most {VARIANTS}")
            out += [(f"{name}-{i}", merged(base, _slice(over, i))) for i in range(count)]
    if len(out) > VARIANTS:
        raise FourfoldError(f"{path}: {len(out)} variants; expected at most {VARIANTS}")
    return out or [("", base)]


def _lengths(over: dict[str, Any]) -> list[int]:
    out = []
    for value in over.values():
        if isinstance(value, list):
            out.append(len(value))
        elif isinstance(value, dict):
            out += _lengths(value)
    return out


def _slice(over: dict[str, Any], i: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in over.items():
        if isinstance(value, list):
            out[key] = value[0 if len(value) == 1 else i]
        else:
            out[key] = _slice(value, i) if isinstance(value, dict) else value
    return out


def _deployment(data: dict[str, Any], path: Path, suffix: str) -> Deployment:
    backend, resources = _mapping(data, "backend", path), _mapping(data, "resources", path)
    engine: Literal["vllm", "sglang"]
    if "vllm_config" in backend:
        engine = "vllm"
    elif "sglang_config" in backend:
        engine = "sglang"
    else:
        raise FourfoldError(f"{path}: backend: type {short(backend.get('type'))!r}; expected vllm or sglang")
    model, unknown = _mapping(data, "model", path), []
    servers = _servers(engine, data, backend, resources, path, unknown)
    out = Deployment(
        name="-".join(part for part in (path.stem, suffix) if part),
        engine=engine,
        models=_models(data, model, servers),
        gpu=str(resources.get("gpu_type", "")),
        servers=servers,
        image=_text(model.get("container")),
        unknown=unknown,
    )
    _workload(out, data, path)
    _router(out, data)
    per_role = [f"{role}_environment" for role in ROLES]
    said = {
        "backend": {"type", f"{engine}_config", "connector", *per_role},
        "model": {"path", "container", "precision"},
    }
    said["resources"] = {"gpu_type", "gpus_per_node"}
    for role in ROLES.values():
        said["resources"] |= {f"{role}_nodes", f"{role}_workers", f"gpus_per_{role}"}
    for section, keys in said.items():
        for key, value in _mapping(data, section, path).items():
            if key not in keys:
                out.unknown.append(f"{section}.{key}: {short(value)}")
    known = {"name", "model", "resources", "backend", "frontend", "benchmark", "environment", "identity", "base"}
    out.unknown += [f"{key}: {short(value)}" for key, value in data.items() if key not in known]
    return out


def _servers(
    engine: str,
    data: dict[str, Any],
    backend: dict[str, Any],
    resources: dict[str, Any],
    path: Path,
    unknown: list[str],
) -> list[Server]:
    config = _mapping(backend, f"{engine}_config", path)
    common = _mapping(data, "environment", path) if data.get("environment") is not None else {}
    apart = any(config.get(role) for role in ("prefill", "decode"))
    out = []
    for role, prefix in ROLES.items():
        if (role == "aggregated") is apart:
            if config.get(role):
                unknown.append(f"backend.{engine}_config.{role}: beside prefill and decode")
            continue
        options = dict(_mapping(config, role, path)) if config.get(role) is not None else {}
        connector = options.pop("connector", backend.get("connector", "nixl"))
        if engine == "vllm" and apart and connector and "kv-transfer-config" not in options:
            if str(connector).lower() in CONNECTORS:
                options["kv-transfer-config"] = {
                    "kv_connector": CONNECTORS[str(connector).lower()],
                    "kv_role": "kv_both",
                }
            elif str(connector).lower() not in ("null", "none"):
                unknown.append(f"backend.connector: {short(connector)}")
        own = f"{role}_environment"
        env = {**common, **(_mapping(backend, own, path) if backend.get(own) is not None else {})}
        workers = resources.get(f"{prefix}_workers", 1)
        if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
            raise FourfoldError(f"{path}: resources.{prefix}_workers: {short(workers)!r}; expected a whole number")
        if workers == 0:
            unknown.append(f"resources.{prefix}_workers: 0; one replica written")
        gpus = resources.get(f"gpus_per_{prefix}")
        out.append(Server(role, options, env, max(workers, 1), gpus if isinstance(gpus, int) else None))
    return out


def _models(data: dict[str, Any], model: dict[str, Any], servers: list[Server]) -> list[str]:
    identity = data.get("identity")
    named = identity.get("model") if isinstance(identity, dict) else None
    out = [named.get("repo") if isinstance(named, dict) else None]
    out += [server.options.get("served-model-name") for server in servers] + [model.get("path")]
    return list(dict.fromkeys(str(name).removeprefix("hf:") for name in out if name))


def _workload(out: Deployment, data: dict[str, Any], path: Path) -> None:
    benchmark = data.get("benchmark")
    if not isinstance(benchmark, dict):
        return
    out.input_tokens, out.output_tokens = _count(benchmark.get("isl")), _count(benchmark.get("osl"))
    if out.input_tokens is None and ("agentic" in path.as_posix() or benchmark.get("type") == "custom"):
        out.kind = "agentic"
    loads = [_count(text) for text in str(benchmark.get("concurrencies", "")).replace(",", "x").split("x")]
    found = [load for load in loads if load]
    out.concurrency = max(found, default=None)
    if len(found) > 1:
        out.unknown.append(f"benchmark.concurrencies: {short(benchmark['concurrencies'])}; the largest is written")
    known = {"isl", "osl", "concurrencies"}
    out.unknown += [f"benchmark.{key}: {short(value)}" for key, value in benchmark.items() if key not in known]


def _router(out: Deployment, data: dict[str, Any]) -> None:
    frontend = data.get("frontend")
    if not isinstance(frontend, dict):
        return
    kinds = {"dynamo": "dynamo", "sglang": "sglang-router", "vllm": "vllm-router"}
    kind = kinds.get(str(frontend.get("type")))
    if kind is not None:
        args = frontend.get("args")
        out.router = {"kind": kind, **({"args": args} if isinstance(args, dict) and args else {})}
    known = {"type", "args"} if kind else set()
    out.unknown += [f"frontend.{key}: {short(value)}" for key, value in frontend.items() if key not in known]


def _mapping(data: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise FourfoldError(f"{path}: {key}: {short(value)}; expected a mapping")
    return value


def _count(value: Any) -> int | None:
    text = str(value).strip()
    return int(text) if WHOLE.fullmatch(text) and 0 < int(text) <= 1 << 24 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None

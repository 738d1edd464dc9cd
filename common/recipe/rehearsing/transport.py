"""How a rehearsal moves the KV cache from prefill to decode: over loopback and from host memory, not GPUs' links."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.rehearsing.substitutions import Substitution
from fourfold.common.recipe.routing import LOCAL
from fourfold.common.recipe.schema import EngineRecipe, Role, RoleName
from fourfold.common.serving import free_port

UCX = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"}
BACKEND, BACKUP = "disaggregation-transfer-backend", "disaggregation-decode-retraction-backup"
CP_RANKS = "SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER"
LOOPBACK = "the loopback interface stands for the links"
TOGETHER = "or rehearse the decode role's options in one server with --together"
HOST_MEMORY = "the KV cache is in host memory"
LEASE = {"kv_lease_duration": 300}  # seconds that prefill keeps a cache; servers that share cores can take over 30


@dataclass(frozen=True)
class Transport:
    """What one role needs for it.

    Attributes:
        options, env: to add to the role's.
        changes: what they replace of the recipe.
    """

    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    changes: list[Substitution] = field(default_factory=list)


def described(engine: str) -> str:
    """The transport, in one clause.

    Raises:
        FourfoldError: its library is not installed, or misses one.
    """
    if engine == "vllm":
        if not importlib.util.find_spec("nixl"):
            raise FourfoldError(f"prefill and decode apart need NIXL: pip install --no-deps nixl nixl-cu13; {TOGETHER}")
        return f"NIXL {metadata.version('nixl')}, UCX over TCP on the loopback interface, host memory to host memory"
    try:
        importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise FourfoldError(
            f"prefill and decode apart need Mooncake ({error}): pip install mooncake-transfer-engine-non-cuda, and "
            f"libibverbs of the system; {TOGETHER}"
        ) from None
    version = next(of.version for of in metadata.distributions() if str(of.name).startswith("mooncake-transfer-engine"))
    return f"Mooncake {version}, TCP on the loopback interface, host memory to host memory"


def transport(engine: str, plan: EngineRecipe, name: RoleName, role: Role) -> Transport:
    """The transport of a role; nothing where a recipe for vLLM names no connector, as in the deployment."""
    asked = {**plan.args, **role.args, **plan.env, **role.env}
    options, env, why = _vllm(asked) if engine == "vllm" else _sglang(name)
    changes = []
    for option, used in {**options, **env}.items():
        requested = asked.get(option)
        same = requested == used or (option in env and str(requested) == used)
        if not same and option in why:
            given = dict(requested) if isinstance(requested, Mapping) else requested
            changes.append(Substitution(option, given, used, why[option]))
    return Transport(options, env, changes)


Needed = tuple[dict[str, Any], dict[str, str], dict[str, str]]  # options, variables, why those that replace something


def _vllm(asked: Mapping[str, Any]) -> Needed:
    given = asked.get("kv-transfer-config")
    if not isinstance(given, Mapping):
        return {}, {}, {}
    named = _nixl(given)
    used: dict[str, Any] = {**(named or {"kv_connector": "NixlConnector"}), "kv_buffer_device": "cpu"}
    used["kv_connector_extra_config"] = {**LEASE, **used.get("kv_connector_extra_config", {})}
    used.setdefault("kv_role", given.get("kv_role", "kv_both"))
    if "kv_load_failure_policy" in given:
        used.setdefault("kv_load_failure_policy", given["kv_load_failure_policy"])
    why = (
        f"{HOST_MEMORY}, and a processor slow"
        if named is given
        else f"{HOST_MEMORY}; of the recipe's connectors NixlConnector alone"
    )
    if named is None:
        why = f"{HOST_MEMORY}; NixlConnector moves it in place of {given.get('kv_connector')}"
    env = UCX | {"VLLM_NIXL_SIDE_CHANNEL_HOST": LOCAL, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    return {"kv-transfer-config": used}, env, {"kv-transfer-config": why, **dict.fromkeys(UCX, LOOPBACK)}


def _sglang(name: RoleName) -> Needed:
    options: dict[str, Any] = {"disaggregation-mode": name, BACKEND: "mooncake"}
    why = {BACKEND: f"{HOST_MEMORY}, which Mooncake moves", "MC_FORCE_TCP": LOOPBACK}
    env = {"MC_FORCE_TCP": "1", "SGLANG_HOST_IP": LOCAL}
    if name == "prefill":
        options["disaggregation-bootstrap-port"] = free_port()
        env[CP_RANKS] = "1"
        why[CP_RANKS] = "one rank sends the same pages, and CUDA does not have to pin their numbers"
    else:
        options[BACKUP] = "cpu_tensor"
        why[BACKUP] = "the pool for requests that are put back asks CUDA for its memory"
    return options, env, why


def _nixl(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration of the NIXL connector, itself or among several."""
    if str(given.get("kv_connector", "")).startswith("Nixl"):
        return given
    several = given.get("kv_connector_extra_config", {}).get("connectors", [])
    return next((one for one in several if str(one.get("kv_connector", "")).startswith("Nixl")), None)

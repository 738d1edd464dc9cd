"""How a rehearsal moves the KV cache from prefill to decode: over loopback and from host memory, not GPUs' links."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.rehearsing.substitutions import Substitution
from fourfold.common.recipe.routing import LOCAL
from fourfold.common.recipe.schema import EngineRecipe, Role
from fourfold.common.serving import free_port

LOOPBACK = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"}
HOST_MEMORY = "the KV cache is in host memory"


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


def described() -> str:
    """The transport, in one clause.

    Raises:
        FourfoldError: NIXL is not installed.
    """
    if not importlib.util.find_spec("nixl"):
        raise FourfoldError(
            "prefill and decode apart need NIXL: pip install --no-deps nixl nixl-cu13; or rehearse the decode role's "
            "options in one server with --together"
        )
    return f"NIXL {metadata.version('nixl')}, UCX over TCP on the loopback interface, host memory to host memory"


def transport(plan: EngineRecipe, role: Role) -> Transport:
    """The transport of a role of a recipe for vLLM; nothing where the role names no connector, as in the deployment."""
    given = {**plan.args, **role.args}.get("kv-transfer-config")
    if not isinstance(given, Mapping):
        return Transport()
    named = _nixl(given)
    used: dict[str, Any] = {**(named or {"kv_connector": "NixlConnector"}), "kv_buffer_device": "cpu"}
    used.setdefault("kv_role", given.get("kv_role", "kv_both"))
    if "kv_load_failure_policy" in given:
        used.setdefault("kv_load_failure_policy", given["kv_load_failure_policy"])
    why = HOST_MEMORY if named is given else f"{HOST_MEMORY}; of the recipe's connectors NixlConnector alone"
    if named is None:
        why = f"{HOST_MEMORY}; NixlConnector moves it in place of {given.get('kv_connector')}"
    changes = [] if used == given else [Substitution("kv-transfer-config", dict(given), used, why)]
    env = LOOPBACK | {"VLLM_NIXL_SIDE_CHANNEL_HOST": LOCAL, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    asked = {**plan.env, **role.env}
    for name, value in LOOPBACK.items():
        if asked.get(name) != value:
            changes.append(Substitution(name, asked.get(name), value, "the loopback interface stands for the links"))
    return Transport({"kv-transfer-config": used}, env, changes)


def _nixl(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration of the NIXL connector, itself or among several."""
    if str(given.get("kv_connector", "")).startswith("Nixl"):
        return given
    several = given.get("kv_connector_extra_config", {}).get("connectors", [])
    return next((one for one in several if str(one.get("kv_connector", "")).startswith("Nixl")), None)

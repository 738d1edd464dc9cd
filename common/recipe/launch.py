"""What a recipe starts: the engine's arguments and environment of each role, replica and node.

The one place where `Parallel`, addresses and fourfold's settings become flags. `check`, `render`, `rehearse` and `run`
all start from it. Arguments are lists, never shell text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.schema import EngineRecipe, HardwareSheet, ModelCard, Parallel, Recipe, Role

DISTRIBUTED_PORT = 20000  # where the ranks of one replica meet
RPC_PORT = 13345  # where vLLM's data-parallel ranks meet


@dataclass(frozen=True)
class Start:
    """One process to start.

    Attributes:
        engine: ``vllm`` or ``sglang``.
        options: option to value, in order, without the model; see `command`.
        env: variables to set.
        nodes: nodes of this replica; ``node`` is the number of this one.
        gpus: GPUs on this node.
        serves: whether this process answers requests (the others of a replica only compute).
    """

    engine: str
    role: str
    replica: int
    node: int
    nodes: int
    gpus: int
    model: str
    options: Mapping[str, Any]
    env: Mapping[str, str]
    serves: bool = True
    port: int = 8000

    @property
    def arguments(self) -> list[str]:
        """The engine's arguments, as its parser takes them."""
        return flags(self.engine, self.options)

    @property
    def command(self) -> list[str]:
        """The command line."""
        if self.engine == "vllm":
            start = ["vllm", "serve", self.model]
        else:
            start = ["python", "-m", "sglang.launch_server", "--model-path", self.model]
        return [*start, *self.arguments]


@dataclass(frozen=True)
class Place:
    """Where processes run; templates and schedulers put their own variables here.

    Attributes:
        head: address of the first node of a replica.
        host: address that a server listens on.
        port: port of the API.
    """

    head: str = "127.0.0.1"
    host: str = "0.0.0.0"
    port: int = 8000


def flags(engine: str, options: Mapping[str, Any]) -> list[str]:
    """Options as arguments: true is a bare flag, false vLLM's ``--no-`` form, a list several values, a mapping JSON.

    Raises:
        FourfoldError: false for SGLang, whose flags have no negative form.
    """
    out: list[str] = []
    for name, value in options.items():
        if value is True:
            out.append(f"--{name}")
        elif value is False:
            if engine == "sglang":
                raise FourfoldError(f"option {name}: false; SGLang's flags have no negative form: leave it out")
            out.append(f"--no-{name}")
        elif isinstance(value, dict):
            out += [f"--{name}", json.dumps(value)]
        elif isinstance(value, list):
            out += [f"--{name}", *(json.dumps(v) if isinstance(v, (dict, list)) else str(v) for v in value)]
        else:
            out += [f"--{name}", str(value)]
    return out


def starts(
    recipe: Recipe,
    engine: str,
    card: ModelCard,
    sheet: HardwareSheet,
    place: Place | None = None,
    model: str | None = None,
) -> list[Start]:
    """Every process of the deployment, in the order to start them: by role, replica and node.

    Args:
        model: path of the weights; default: the card's repository.
    """
    place, plan, out = place or Place(), engine_of(recipe, engine), []
    for name, role in plan.roles.items():
        nodes = node_count(role.parallel, sheet)
        for replica in range(role.replicas):
            for node in range(nodes):
                out.append(_start(engine, plan, name, role, sheet, place, model or card.repo, replica, node, nodes))
    return out


def engine_of(recipe: Recipe, engine: str) -> EngineRecipe:
    """The engine's part of a recipe.

    Raises:
        FourfoldError: the recipe is not for that engine.
    """
    for name, plan in recipe.engines.items():
        if name == engine:
            return plan
    raise FourfoldError(f"recipe {recipe.id}: not for {engine}; it is for {', '.join(recipe.engines)}")


def node_count(parallel: Parallel, sheet: HardwareSheet) -> int:
    """Nodes of one replica."""
    return -(-parallel.world // sheet.gpus_per_node)


def is_for(recipe: Recipe, engine: str, version: str) -> bool:
    """Whether the recipe is for this version of this engine."""
    return any(
        name == engine and SpecifierSet(plan.versions, prereleases=True).contains(version)
        for name, plan in recipe.engines.items()
    )


def give_settings(engine: str, plan: EngineRecipe, options: dict[str, Any], env: dict[str, str]) -> None:
    """Add fourfold's settings where the engine's channel for them is; nothing for the stock engine."""
    if plan.fourfold is None:
        return
    settings = plan.fourfold.model_dump(exclude_unset=True)
    if engine == "vllm":
        options["additional-config"] = {"fourfold": settings}
    else:
        env["FOURFOLD_CONFIG"] = json.dumps(settings)


def _start(
    engine: str,
    plan: EngineRecipe,
    name: str,
    role: Role,
    sheet: HardwareSheet,
    place: Place,
    model: str,
    replica: int,
    node: int,
    nodes: int,
) -> Start:
    gpus = -(-role.parallel.world // nodes)
    options = (_vllm if engine == "vllm" else _sglang)(role.parallel, place, node, nodes, gpus)
    if engine == "sglang" and name != "aggregated":
        options["disaggregation-mode"] = name
    env = {key: str(value) for key, value in {**plan.env, **role.env}.items()}
    give_settings(engine, plan, options, env)
    serves = node == 0
    if serves or engine == "sglang":
        options |= {"host": place.host, "port": place.port}
    options |= {**plan.args, **role.args}
    return Start(engine, name, replica, node, nodes, gpus, model, options, env, serves, place.port)


def _vllm(parallel: Parallel, place: Place, node: int, nodes: int, gpus: int) -> dict[str, Any]:
    options = _above_one(
        {
            "tensor-parallel-size": parallel.tensor,
            "pipeline-parallel-size": parallel.pipeline,
            "decode-context-parallel-size": parallel.context,
            "data-parallel-size": parallel.data,
        }
    )
    if parallel.expert > 1:
        options["enable-expert-parallel"] = True
    if nodes == 1:
        return options
    if parallel.data > 1:
        local = gpus // (parallel.tensor * parallel.pipeline)
        if not local:
            raise FourfoldError(
                f"parallel: one data-parallel rank needs {parallel.tensor * parallel.pipeline} GPUs and a node has "
                f"{gpus}; vLLM cannot spread it over nodes"
            )
        options |= {"data-parallel-size-local": local, "data-parallel-address": place.head}
        options["data-parallel-rpc-port"] = RPC_PORT
        if node:
            options |= {"data-parallel-start-rank": node * local, "headless": True}
        return options
    options |= {"nnodes": nodes, "node-rank": node, "master-addr": place.head, "master-port": DISTRIBUTED_PORT}
    if node:
        options["headless"] = True
    return options


def _sglang(parallel: Parallel, place: Place, node: int, nodes: int, gpus: int) -> dict[str, Any]:
    options = _above_one(
        {
            "tp-size": parallel.tensor * parallel.data,  # SGLang counts attention's data-parallel ranks in it
            "pp-size": parallel.pipeline,
            "attn-dp-size": parallel.data,
            "ep-size": parallel.expert,
            "dcp-size": parallel.context,
        }
    )
    if nodes > 1:
        options |= {"nnodes": nodes, "node-rank": node, "dist-init-addr": f"{place.head}:{DISTRIBUTED_PORT}"}
    return options


def _above_one(sizes: dict[str, int]) -> dict[str, Any]:
    return {name: size for name, size in sizes.items() if size > 1}

"""Prefill and decode apart: a server of each role, the KV cache from one to the other, and the router before both.

Decode has to take the prompts from prefill and not to compute them again; the servers' own counters say whether it did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.launch import Start, flags, give_settings
from fourfold.common.recipe.rehearsing import speculation
from fourfold.common.recipe.rehearsing.asking import Answers, ask
from fourfold.common.recipe.rehearsing.moved import Moved, counts
from fourfold.common.recipe.rehearsing.replica import Replica
from fourfold.common.recipe.rehearsing.substitutions import Substitution, substituted
from fourfold.common.recipe.rehearsing.transport import described, transport
from fourfold.common.recipe.routing import router, router_version
from fourfold.common.recipe.schema import EngineRecipe, HardwareSheet, ModelCard, Recipe, RoleName
from fourfold.common.serving import EngineServer, free_port, own_cores, shares

ROLES: tuple[RoleName, RoleName] = ("prefill", "decode")


@dataclass(frozen=True)
class Pair:
    """What runs.

    Attributes:
        options, env: of each role.
        changes: what is replaced of the recipe; the prefill role's where decode has not the same.
        ran: how they ran apart, for the proof.
    """

    recipe: Recipe
    plan: EngineRecipe
    engine: str
    options: dict[RoleName, dict[str, Any]]
    env: dict[RoleName, dict[str, str]]
    changes: list[Substitution]
    ran: dict[str, str]

    @property
    def not_rehearsed(self) -> list[str]:
        """What of it stays for the real deployment."""
        out = ["RDMA and NVLink between prefill and decode, and KV caches in the memory of GPUs"]
        if any(role.parallel.world > 1 for role in self.plan.roles.values()):
            out.append("KV caches between ranks: prefill and decode of several, or of different numbers")
        several = [f"{role.replicas} of {name}" for name, role in self.plan.roles.items() if role.replicas > 1]
        if several:
            out.append(f"the router's choice among servers ({', '.join(several)})")
        if self.plan.router is not None and not self.ran["router"].startswith(self.plan.router.kind):
            out.append(f"the router ({self.plan.router.kind}); {self.ran['router']} stood for it")
        return out


def pair(recipe: Recipe, plan: EngineRecipe, engine: str, replica: Replica) -> Pair:
    """Both roles' options and variables on a processor.

    Raises:
        FourfoldError: what moves the KV cache, or the router, is not installed; the recipe wants none.
    """
    options: dict[RoleName, dict[str, Any]] = {}
    env: dict[RoleName, dict[str, str]] = {}
    changes: dict[RoleName, list[Substitution]] = {}
    named = plan.router.kind if plan.router else "none"
    if plan.router is not None and named == "none":
        raise FourfoldError(f"recipe {recipe.id}: router none; prefill and decode apart need one, such as vllm-router")
    kind = named if named in ("vllm-router", "sglang-router") else f"{engine}-router"
    ran = {"transport": described(engine), "router": f"{kind} {router_version(kind)}"}
    for name in ROLES:
        role = next(role for found, role in plan.roles.items() if found == name)
        given, variables, replaced = substituted(recipe, engine, plan, name, replica.traits.family)
        used, drafting = speculation.with_replica(engine, given, replica)
        link = transport(engine, plan, name, role)
        again = {change.what for change in link.changes} | {*link.options, *link.env}
        options[name], env[name] = used | link.options, variables | link.env
        give_settings(engine, plan, options[name], env[name])
        changes[name] = [change for change in replaced if change.what not in again] + drafting + link.changes
    told = changes["decode"]
    for change in changes["prefill"]:
        if change not in told:
            told = [*told, Substitution(f"prefill: {change.what}", change.requested, change.used, change.why)]
    if named != kind:
        told = [*told, Substitution("router", named, kind, "the engine's own router stands before the servers")]
    return Pair(recipe, plan, engine, options, env, told, ran)


def answers_apart(
    of: Pair,
    card: ModelCard,
    sheet: HardwareSheet,
    replica: Replica,
    logs: Path,
    speculates: bool,
    tick: Callable[[str], None],
) -> tuple[Answers, Moved]:
    """Start both servers and the router, ask the router everything, and end them."""
    from fourfold.common.recipe.rendering.layout import Layout, Process

    servers: dict[RoleName, EngineServer] = {}
    processes: list[Process] = []
    model = str(replica.model)
    for index, (name, cores) in enumerate(zip(ROLES, shares(len(ROLES)), strict=True)):
        options, env, port = of.options[name], {**own_cores(of.engine, cores), **of.env[name]}, free_port()
        log = logs / f"{of.engine}-{name}.log"
        servers[name] = EngineServer(of.engine, model, log, flags(of.engine, options), env, port)
        start = Start(of.engine, name, 0, 0, 1, 1, model, options, env, True, port)
        processes.append(Process(start, 0, 0, index, index))
    layout = Layout(of.recipe, of.plan, of.engine, card, sheet, model, processes, "")
    running: list[EngineServer] = [*servers.values()]
    try:
        for server in servers.values():
            server.start()
        for name, server in servers.items():
            server.wait(tick=lambda line, name=name: tick(f"{name}: {line[:100]}"))
        before = router(layout, logs / f"{of.engine}-router.log", free_port())  # a port that is free now
        assert before is not None
        running.append(before)
        before.start()
        before.wait(120, lambda line: tick(f"router: {line[:100]}"))
        tick("asking the router")
        start = counts(of.engine, servers["prefill"], servers["decode"])
        answers = ask(before, speculates, servers["decode"])
        end = counts(of.engine, servers["prefill"], servers["decode"])
        return answers, Moved(len(answers.texts) + 1, **{name: end[name] - start[name] for name in end})
    finally:
        for server in reversed(running):
            server.stop()

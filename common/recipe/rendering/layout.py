"""Where the processes of a deployment go: machine, GPUs, port; the same for every target.

A replica that needs whole machines gets them in order; smaller ones share a machine. Values that are known only where
the deployment runs (`HEAD`, `HOST`, `MODEL`) are marks, which no value of a recipe can hold: each target puts its own
variable in their place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

from packaging.specifiers import SpecifierSet

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.launch import Place, Start, engine_of, node_count, starts
from fourfold.common.recipe.schema import EngineRecipe, HardwareSheet, ModelCard, Recipe, Role

HEAD, HOST, MODEL = "\0head\0", "\0host\0", "\0model\0"  # first machine of the replica, this machine, the weights
PORT, NIXL_PORT, BOOTSTRAP_PORT, ROUTER_PORT = 8000, 5600, 8998, 9000
# Weights of 900 GB, kernels compiled at first use and captured graphs take 45 to 60 minutes; then half as much again.
BOOT_SECONDS = 5400
TESTED = {"vllm": ("0.33.0", "0.32.0"), "sglang": ("0.5.23",)}
# A StatefulSet's name has 52 characters at most, since its pods' label controller-revision-hash adds 11 to it
# (kubernetes#64023). LeaderWorkerSet names one NAME-aggregated-99, as it does for each group of several pods.
NAME = 52 - len("-aggregated-99")
IMAGES = {"vllm": "vllm/vllm-openai:v{}", "sglang": "lmsysorg/sglang:v{}"}


@dataclass(frozen=True)
class Rendered:
    """What a target makes.

    Attributes:
        files: relative path to text.
        notes: what the reader has to know or to do.
    """

    files: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Process:
    """One process and its place.

    Attributes:
        machine: number of its machine; ``head`` that of the first of its replica.
        first_gpu: number of its first GPU on the machine; ``index`` counts the processes of the machine.
    """

    start: Start
    machine: int
    head: int
    first_gpu: int
    index: int

    @property
    def name(self) -> str:
        """Such as ``prefill-0`` or ``decode-1-node-2``."""
        start = self.start
        node = f"-node-{start.node}" if start.nodes > 1 else ""
        return f"{start.role}-{start.replica}{node}"


@dataclass(frozen=True)
class Layout:
    """A deployment."""

    recipe: Recipe
    plan: EngineRecipe
    engine: str
    card: ModelCard
    sheet: HardwareSheet
    model: str
    processes: list[Process]
    image: str

    @property
    def machines(self) -> int:
        return 1 + max(process.machine for process in self.processes)

    @property
    def gpu(self) -> bool:
        """Whether ranks are on GPUs."""
        return self.sheet.compute_capability is not None

    @property
    def name(self) -> str:
        """A name that Kubernetes, Docker and Slurm take, the recipe's and the engine's alone."""
        return self.short(NAME)

    def short(self, most: int) -> str:
        """The name in at most so many characters; one that is cut ends in digits of its hash."""
        whole = re.sub(r"[^a-z0-9]+", "-", f"{self.recipe.id}-{self.engine}").strip("-")
        whole = whole if whole[0].isalpha() else f"r-{whole}"  # Services begin with a letter
        if len(whole) <= most:
            return whole
        return f"{whole[: most - 7].strip('-')}-{sha256(whole.encode()).hexdigest()[:6]}"

    @property
    def title(self) -> str:
        """First line of a comment."""
        return f"Rendered by fourfold from {self.recipe.id} for {self.engine} ({self.card.id} on {self.sheet.id})"

    @property
    def one_domain(self) -> bool:
        """Whether all machines can be, and should be, in one NVLink domain."""
        spans = self.spans or self.plan.disaggregated
        return self.gpu and spans and self.machines * self.sheet.gpus_per_node <= self.sheet.nvlink_domain

    @property
    def spans(self) -> bool:
        """Whether a replica spans machines that NVLink joins."""
        wide = self.sheet.nvlink_domain > self.sheet.gpus_per_node
        return self.gpu and wide and any(process.start.nodes > 1 for process in self.processes)

    @property
    def uses_fourfold(self) -> bool:
        """Whether the engine needs fourfold beside it."""
        given = [self.plan.args, self.plan.env, *((role.args, role.env) for role in self.plan.roles.values())]
        return self.plan.fourfold is not None or "fourfold" in repr(given).lower()

    def of_machine(self, machine: int) -> list[Process]:
        return [process for process in self.processes if process.machine == machine]

    def serving(self, role: str) -> list[Process]:
        """The processes of a role that answer requests."""
        return [process for process in self.processes if process.start.role == role and process.start.serves]

    def role(self, name: str) -> Role:
        return next(role for found, role in self.plan.roles.items() if found == name)

    def nodes(self, role: str) -> int:
        """Machines of one replica of a role."""
        return node_count(self.role(role).parallel, self.sheet)


def layout(
    recipe: Recipe, engine: str, card: ModelCard, sheet: HardwareSheet, model: str | None = None, packed: bool = True
) -> Layout:
    """Place every process.

    Args:
        model: path or repository of the weights; default: the card's.
        packed: several replicas may share a machine and then take the ports after the first; else each starts at 0.

    Raises:
        FourfoldError: the recipe is not for the engine, or ``model`` or a value is no plain text.
    """
    if model is not None and not re.fullmatch(r"[^\0\n\r]+", model):
        raise FourfoldError(f"--model {model!r}: expected a path or the name of a repository on one line")
    plan = engine_of(recipe, engine)
    if "\\x00" in repr(plan):  # no mark may come from a recipe
        raise FourfoldError(f"recipe {recipe.id}: a value holds a null character; expected plain text")
    processes: list[Process] = []
    machine, used, index, head = 0, 0, 0, 0
    for start in starts(recipe, engine, card, sheet, Place(head=HEAD, port=PORT), MODEL):
        whole = start.nodes > 1 or not packed
        if processes and (whole or used + start.gpus > sheet.gpus_per_node):
            machine, used, index = machine + 1, 0, 0
        if start.node == 0:
            head = machine
        processes.append(Process(_placed(start, plan, index, sheet), machine, head, used, index))
        used, index = (sheet.gpus_per_node if whole else used + start.gpus), index + 1
    image = plan.image or default_image(plan, engine)
    return Layout(recipe, plan, engine, card, sheet, model or card.repo, processes, image)


def default_image(plan: EngineRecipe, engine: str) -> str:
    """The engine's own image of the newest version that is tested here and in the recipe's range."""
    allowed = SpecifierSet(plan.versions)
    version = next((version for version in TESTED[engine] if allowed.contains(version)), TESTED[engine][0])
    return IMAGES[engine].format(version)


def _placed(start: Start, plan: EngineRecipe, index: int, sheet: HardwareSheet) -> Start:
    """The process with the ports of its place, and what only a whole deployment needs."""
    options, env = dict(start.options), dict(start.env)
    port = PORT + index
    if "port" in options:
        options["port"] = port
    if plan.disaggregated and start.engine == "vllm":
        env.setdefault("VLLM_NIXL_SIDE_CHANNEL_HOST", HOST)
        env.setdefault("VLLM_NIXL_SIDE_CHANNEL_PORT", str(NIXL_PORT + 100 * index))
    if start.role == "prefill" and start.engine == "sglang":
        options.setdefault("disaggregation-bootstrap-port", BOOTSTRAP_PORT + index)
    if start.engine == "vllm" and sheet.compute_capability is not None:
        env.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(BOOT_SECONDS))
    return replace(start, options=options, env=env, port=port)


def router_command(of: Layout, address: Callable[[Process], str], port: int = ROUTER_PORT) -> list[str] | None:
    """The command of the router before the servers; None: there is one server and nothing to route.

    Args:
        address: where a process is reached, without scheme and port.
    """
    from fourfold.common.recipe.launch import flags

    roles = [role for role in ("prefill", "decode", "aggregated") if role in of.plan.roles]
    servers = {role: [(address(p), p) for p in of.serving(role)] for role in roles}
    kind = router_kind(of)
    if kind is None:
        return None
    own = of.plan.router.args if of.plan.router and of.plan.router.kind == kind else {}
    command = ["vllm-router"] if kind == "vllm-router" else ["python3", "-m", "sglang_router.launch_router"]
    if of.plan.disaggregated:
        command += ["--vllm-pd-disaggregation", *_connector(own)] if kind == "vllm-router" else ["--pd-disaggregation"]
        for host, process in servers["prefill"]:
            command += ["--prefill", f"http://{host}:{process.start.port}"]
            if kind == "sglang-router":
                command.append(str(process.start.options["disaggregation-bootstrap-port"]))
        for host, process in servers["decode"]:
            command += ["--decode", f"http://{host}:{process.start.port}"]
    else:
        command += ["--worker-urls", *(f"http://{host}:{p.start.port}" for host, p in servers["aggregated"])]
    return [*command, "--host", "0.0.0.0", "--port", str(port), *flags("vllm", own)]


def router_kind(of: Layout) -> str | None:
    """``vllm-router`` or ``sglang-router``: what the recipe names, else the engine's own; None: none is needed."""
    named = of.plan.router.kind if of.plan.router else None
    if named == "none" or sum(len(of.serving(role)) for role in of.plan.roles) < 2:
        return None
    return named if named in ("vllm-router", "sglang-router") else f"{of.engine}-router"


def router_notes(of: Layout, target: str) -> list[str]:
    """What to say where a target has another router than the recipe names."""
    named = of.plan.router.kind if of.plan.router else None
    if named not in ("dynamo", "llm-d"):
        return []
    return [f"the recipe's router is {named}, which {target} does not start: {router_kind(of) or 'no router'} instead"]


def _connector(own: dict[str, Any]) -> list[str]:
    return [] if "kv-connector" in own else ["--kv-connector", "nixl"]


def fourfold_notes(of: Layout) -> list[str]:
    """What to say of an image that needs fourfold."""
    if not of.uses_fourfold:
        return []
    return [f"the recipe uses fourfold: build an image from {of.image} with `pip install fourfold` and name it instead"]


def draft_notes(of: Layout) -> list[str]:
    """What to do for a draft directory of one of fourfold's own heads."""
    given = repr([process.start.options for process in of.processes])
    named = sorted({match[0] for match in re.finditer(r"fourfold/([a-z0-9.-]+)-mtp-(?:vllm|sglang)", given)})
    return [
        f"{name}: a directory that `fourfold mtp extract HEAD {name} --engine {of.engine}` makes of the head that "
        "fourfold ships below recipes/heads"
        for name in named
    ]


def machine_file(of: Layout, machine: int, suffix: str = ".sh") -> str:
    """The file of one machine."""
    return str(PurePosixPath(f"node-{machine:0{len(str(of.machines - 1))}d}{suffix}"))

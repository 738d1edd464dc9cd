"""``fourfold recipe run``: start a recipe's processes on this machine, and end them all.

The machine has to be what the recipe is for: its number of GPUs and their compute capability, or a processor for
recipes of the sheet ``cpu``; a deployment of several machines is refused before anything starts. Every server is an
`EngineServer`, in a process group of its own. Interrupting or terminating the command ends all of them.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.installed import installed_version
from fourfold.common.recipe.options import Roots
from fourfold.common.recipe.routing import LOCAL, router
from fourfold.common.serving import EngineServer, free_port, own_cores, shares, termination_raises

if TYPE_CHECKING:
    from fourfold.common.recipe.rendering.layout import Layout, Process
    from fourfold.common.recipe.schema import ModelCard

OWN_DRAFT = re.compile(r"fourfold/([a-z0-9.-]+)-mtp-(vllm|sglang)")  # a draft directory of one of fourfold's heads
BOOTSTRAP = "disaggregation-bootstrap-port"
CPU_BOOT_SECONDS = 900


@dataclass
class Deployment:
    """What runs.

    Attributes:
        servers: name to server, in the order to start them.
        router: what stands before them, if anything.
    """

    servers: dict[str, EngineServer]
    router: EngineServer | None = None
    boot_seconds: float = CPU_BOOT_SECONDS
    serving: list[str] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        """Where requests go."""
        first = self.router or self.servers[self.serving[0]]
        return f"{first.url}/v1"

    @property
    def all(self) -> dict[str, EngineServer]:
        return {**self.servers, **({"router": self.router} if self.router else {})}

    def start(self, tick: Callable[[str], None] = lambda line: None) -> None:
        """Start everything and wait until it is healthy.

        Raises:
            FourfoldError: a process ended or was not healthy in time; the end of its log is in the message.
        """
        for server in self.servers.values():
            server.start()
        for name in self.serving:
            self.servers[name].wait(self.boot_seconds, lambda line, name=name: tick(f"{name}: {line[:120]}"))
        if self.router is not None:
            self.router.start()
            self.router.wait(120, lambda line: tick(f"router: {line[:120]}"))

    def ended(self) -> str | None:
        """Name and status of a process that ended."""
        for name, server in self.all.items():
            if server.process is not None and server.process.poll() is not None:
                return f"{name} ended with status {server.process.returncode}\n{server.tail()}"
        return None

    def stop(self) -> None:
        """End every process."""
        for server in reversed(self.all.values()):
            server.stop()


def deployment(of: Layout, logs: Path, port: int = 0) -> Deployment:
    """The processes of a layout on this machine.

    Args:
        port: of the endpoint; 0: 8000, or a free one.

    Raises:
        FourfoldError: the machine is not the recipe's, or an engine or a router is not installed.
    """
    from fourfold.common.recipe.rendering.layout import BOOT_SECONDS, router_kind

    check_machine(of)
    installed_version(of.recipe, of.engine)
    endpoint = free_port(port or 8000)
    if port and endpoint != port:
        raise FourfoldError(f"--port {port}: in use; take another one, or leave it out")
    routed = router_kind(of) is not None
    servers: dict[str, EngineServer] = {}
    processes: list[Process] = []
    for process, cores in zip(of.processes, shares(len(of.processes)), strict=True):
        own = endpoint if not routed and not processes else free_port()
        options = with_own_drafts(process.start.options, logs / "drafts")
        if BOOTSTRAP in options:
            options[BOOTSTRAP] = free_port(int(options[BOOTSTRAP]))
        start = replace(process.start, port=own, options=options)
        arguments = [_local(word, of.model) for word in start.arguments]
        env = {name: _local(value, of.model) for name, value in start.env.items()}
        if side := env.get("VLLM_NIXL_SIDE_CHANNEL_PORT"):
            env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port(int(side)))
        if of.gpu:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(str(process.first_gpu + i) for i in range(start.gpus))
        elif len(of.processes) > 1:
            env = {**own_cores(of.engine, cores), **env}
        log = logs / f"{process.name}.log"
        servers[process.name] = EngineServer(
            of.engine, of.model, log, _without(arguments, "--host", "--port"), env, own, cpu=not of.gpu
        )
        processes.append(replace(process, start=start))
    boot = BOOT_SECONDS if of.gpu else CPU_BOOT_SECONDS
    made = Deployment(servers, None, boot, [process.name for process in processes if process.start.serves])
    made.router = router(replace(of, processes=processes), logs / "router.log", endpoint)
    return made


def check_machine(of: Layout) -> None:
    """Refuse another machine than the recipe's.

    Raises:
        FourfoldError: says what is here, what is expected and what to do.
    """
    if of.machines > 1:
        raise FourfoldError(
            f"recipe {of.recipe.id}: needs {of.machines} machines of {of.sheet.id}; run starts one. "
            f"`fourfold recipe render {of.recipe.id} --engine {of.engine} --target slurm` starts all"
        )
    if not of.gpu:
        return
    needed = sum(process.start.gpus for process in of.processes)
    found = gpus_here()
    if len(found) < needed:
        raise FourfoldError(
            f"recipe {of.recipe.id}: needs {needed} GPUs ({of.sheet.gpu}); nvidia-smi shows {len(found)} here. "
            "Recipes whose hardware is cpu run without one; `fourfold recipe rehearse` tries this one on a processor"
        )
    other = sorted({capability for capability in found if capability != of.sheet.compute_capability})
    if other:
        raise FourfoldError(
            f"recipe {of.recipe.id}: is for {of.sheet.gpu}, compute capability {of.sheet.compute_capability}; "
            f"here is {', '.join(other)}. Take a recipe of that hardware: `fourfold recipe list`"
        )


def gpus_here() -> list[str]:
    """The compute capability of each GPU of this machine; empty where there is no driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^\s*(\d+\.\d+)\s*$", done.stdout, re.MULTILINE) if done.returncode == 0 else []


def weights(card: ModelCard, given: str | None) -> str:
    """Path or repository to serve: what was given, the demonstration's own model, or the card's repository.

    Raises:
        FourfoldError: ``given`` is no directory.
    """
    from fourfold.common.demo.model import resolve

    if given is not None:
        if not (Path(given) / "config.json").is_file():
            raise FourfoldError(f"--model {given}: expected the directory of a model, with its config.json")
        return str(Path(given).resolve())
    if card.id == "smollm2-135m-instruct":
        return str(resolve("smollm2"))
    return card.repo


def with_own_drafts(value: Any, folder: Path) -> Any:
    """Options in which the name of a draft directory of fourfold's own heads is the directory, made where it is not.

    Raises:
        FourfoldError: fourfold has no such head.
    """
    from fourfold import recipes
    from fourfold.common.mtp.extract import extract

    if isinstance(value, Mapping):
        return {name: with_own_drafts(inner, folder) for name, inner in value.items()}
    named = OWN_DRAFT.fullmatch(value) if isinstance(value, str) else None
    if named is None:
        return value
    head, made = Path(recipes.__file__).parent / "heads" / named[1], folder / f"{named[1]}-{named[2]}"
    if not (head / "config.json").is_file():
        raise FourfoldError(f"{value}: fourfold has no head {named[1]}; expected a draft directory")
    if not made.exists():
        extract(head, made, "vllm" if named[2] == "vllm" else "sglang")
    return str(made)


def _local(word: str, model: str) -> str:
    from fourfold.common.recipe.rendering.layout import HEAD, HOST, MODEL

    return word.replace(HEAD, LOCAL).replace(HOST, LOCAL).replace(MODEL, model)


def _without(arguments: Sequence[str], *options: str) -> list[str]:
    """Arguments without options of one value."""
    return [word for i, word in enumerate(arguments) if word not in options and not (i and arguments[i - 1] in options)]


def run(
    recipe: Annotated[str, typer.Argument(help="Id of a recipe, or its file.")],
    engine: Annotated[str, typer.Option(help="vllm or sglang: the engine of this environment.")],
    model: Annotated[str | None, typer.Option(help="Directory of the weights. Default: the recipe's.")] = None,
    port: Annotated[int, typer.Option(help="Port of the endpoint. Default: 8000, or a free one.")] = 0,
    logs: Annotated[Path | None, typer.Option(help="Folder for the processes' logs. Default: a new one.")] = None,
    catalogue: Roots = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print where it answers as one line of JSON.")] = False,
) -> None:
    """Start a recipe on this machine, say where it answers, and serve until Ctrl-C."""
    from rich.console import Console

    from fourfold.common.recipe.loading import Catalogue
    from fourfold.common.recipe.rendering.layout import layout

    known = Catalogue(catalogue)
    found = known.recipe(recipe)
    card, sheet = known.model(found.model), known.hardware(found.hardware)
    of = layout(found, engine, card, sheet, "unresolved")
    check_machine(of)  # before any weights are looked for
    installed_version(of.recipe, of.engine)
    of = replace(of, model=weights(card, model))
    folder = logs or Path(tempfile.mkdtemp(prefix="fourfold-run-"))
    made = deployment(of, folder, port)
    console = Console(stderr=True)
    with termination_raises(KeyboardInterrupt()):
        try:
            with console.status("starting") as status:
                made.start(status.update)
            _announce(made, of, folder, as_json)
            while (gone := made.ended()) is None:
                time.sleep(1)
            raise FourfoldError(gone)
        except KeyboardInterrupt:
            console.print("stopping")
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # a second one would leave processes behind
            made.stop()
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _announce(made: Deployment, of: Layout, folder: Path, as_json: bool) -> None:
    metrics = [f"{made.servers[name].url}/metrics" for name in made.serving]
    if of.engine == "sglang" and not all("--enable-metrics" in made.servers[name].args for name in made.serving):
        metrics = []
    facts: dict[str, Any] = {"endpoint": made.endpoint, "model": of.model, "metrics": metrics, "logs": str(folder)}
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        typer.echo(f"endpoint  {made.endpoint} (model {of.model})")
        typer.echo(f"metrics   {', '.join(metrics) or 'none: SGLang has them with enable-metrics'}")
        typer.echo(f"logs      {folder}")
        typer.echo("Ctrl-C ends it")
    sys.stdout.flush()

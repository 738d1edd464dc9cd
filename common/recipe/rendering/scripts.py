"""Targets ``bash``, ``docker`` and ``slurm``: a script for each machine, one for the router, and what they share.

A script starts the processes of its machine, waits until they are healthy, ends all when one ends or when it is
interrupted, and leaves nothing running. Addresses come from ``FOURFOLD_NODES``, weights from ``FOURFOLD_MODEL``.
"""

from __future__ import annotations

import shlex

from fourfold.common.recipe.rendering.layout import (
    BOOT_SECONDS,
    ROUTER_PORT,
    Layout,
    Process,
    Rendered,
    machine_file,
    router_command,
    router_notes,
)
from fourfold.common.recipe.rendering.shell import command, lines, word

HEADER = "#!/usr/bin/env bash\n"
COMMON = "common.sh"
SOURCE = (
    'here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)',
    f"# shellcheck source-path=SCRIPTDIR source={COMMON}",
    f'source "$here/{COMMON}"',
)
# `set -m` gives every process a group of its own, so that its children end with it.
FUNCTIONS = """\
boot_seconds=${FOURFOLD_BOOT_SECONDS:-%(boot)d}
pids=()

stop() {
  trap '' INT TERM
  for pid in "${pids[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
  for ((i = 0; i < 60; i++)); do
    left=0
    for pid in "${pids[@]}"; do if kill -0 -- "-$pid" 2>/dev/null; then left=1; fi; done
    [ "$left" = 1 ] || return 0
    sleep 1
  done
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}

set -m
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# healthy NAME URL [PID]: wait for an answer of URL, at most as long as a first start takes.
healthy() {
  local end=$((SECONDS + boot_seconds))
  until curl --fail --silent --output /dev/null --max-time 5 "$2"; do
    if [ -n "${3:-}" ] && ! kill -0 "$3" 2>/dev/null; then
      echo "$1 ended before it was healthy" >&2
      exit 1
    fi
    if [ "$SECONDS" -ge "$end" ]; then
      echo "$1 was not healthy after $boot_seconds s: $2" >&2
      exit 1
    fi
    sleep 2 &
    wait "$!" || true
  done
  echo "$1 is healthy: $2"
}

# run: wait until a process ends, which ends the script and thereby the others.
run() {
  local status=0
  wait -n "${pids[@]}" || status=$?
  echo "a process ended with status $status" >&2
  exit 1
}
"""


def bash(of: Layout) -> Rendered:
    """Scripts that start the installed engine."""
    notes = [f"the recipe uses fourfold: `pip install fourfold` beside {of.engine}"] if of.uses_fourfold else []
    return Rendered(_files(of, docker=False), notes + _addresses(of) + router_notes(of, "bash"))


def docker(of: Layout) -> Rendered:
    """Scripts that start containers, with the host's network; an image with fourfold where the recipe uses it."""
    files = _files(of, docker=True)
    if of.uses_fourfold:
        files["Dockerfile"] = f"FROM {of.image}\nRUN pip install --no-cache-dir fourfold\n"
    notes = [f"build the image first: docker build -t {image(of)} ."] if of.uses_fourfold else []
    return Rendered(files, notes + _addresses(of) + router_notes(of, "docker"))


def slurm(of: Layout) -> Rendered:
    """A batch script over the scripts of ``bash``."""
    files = _files(of, docker=False)
    notes = router_notes(of, "slurm")
    directives = [f"--job-name={of.name}", f"--nodes={of.machines}", "--ntasks-per-node=1", "--exclusive"]
    if of.gpu:
        directives.append(f"--gpus-per-node={of.sheet.gpus_per_node}")
    segment = of.machines if of.one_domain else max(process.start.nodes for process in of.processes)
    if (of.spans or of.one_domain) and segment > 1:
        if of.machines % segment:
            notes.append(
                f"--segment={segment} left out: it has to divide {of.machines} nodes; see to the domain by hand"
            )
        else:
            directives.append(f"--segment={segment}")
    directives += ["--time=24:00:00", "--output=%x-%j.log"]
    script = "./" + machine_file(of, 0).replace("0" * len(str(of.machines - 1)), f"%0{len(str(of.machines - 1))}d")
    text = [HEADER.rstrip(), *(f"#SBATCH {directive}" for directive in directives)]
    text += [
        f"# {of.title}. Submit it from this folder: sbatch job.sbatch",
        "set -euo pipefail",
        'cd -- "$SLURM_SUBMIT_DIR"',
        'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        'export FOURFOLD_NODES="${hosts[*]}"',
    ]
    if "router.sh" in files:
        text.append("bash ./router.sh &")
    arguments = f"--nodes={of.machines} --ntasks={of.machines} --ntasks-per-node=1 --kill-on-bad-exit=1"
    text += ["# SLURM_NODEID is known on the node only.", "# shellcheck disable=SC2016"]
    text.append(f'srun {arguments} bash -c \'exec bash "$(printf {script} "$SLURM_NODEID")"\'')
    files["job.sbatch"] = "\n".join(text) + "\n"
    if of.one_domain or of.spans:
        notes.append("--segment keeps nodes in one NVLink domain where the cluster uses Slurm's block topology")
    if of.uses_fourfold:
        notes.append(f"the recipe uses fourfold: `pip install fourfold` beside {of.engine} on every node")
    return Rendered(files, notes)


def image(of: Layout) -> str:
    """The image that containers start."""
    return f"{of.name}:fourfold" if of.uses_fourfold else of.image


def _addresses(of: Layout) -> list[str]:
    if of.machines == 1:
        return []
    return [f"set FOURFOLD_NODES to the {of.machines} machines' addresses, in order, and start one script on each"]


def _files(of: Layout, docker: bool) -> dict[str, str]:
    files = {COMMON: _common(of)}
    for machine in range(of.machines):
        files[machine_file(of, machine)] = _machine(of, machine, docker)
    router = router_command(of, lambda process: f"\0node{_letters(process.machine)}\0")
    if router is not None:
        files["router.sh"] = _router(of, router, docker)
    return files


def _common(of: Layout) -> str:
    default = " ".join(f"node-{i}" for i in range(of.machines)) if of.machines > 1 else "127.0.0.1"
    return "\n".join(
        [
            HEADER.rstrip(),
            f"# {of.title}. The other scripts read this one.",
            "set -euo pipefail",
            f'read -r -a nodes <<<"${{FOURFOLD_NODES:-{default}}}"',
            f'if [ "${{#nodes[@]}}" -ne {of.machines} ]; then',
            f'  echo "FOURFOLD_NODES: ${{#nodes[@]}} addresses; expected {of.machines}, in order" >&2',
            "  exit 2",
            "fi",
            "# shellcheck disable=SC2034",
            f"model=${{FOURFOLD_MODEL:-{shlex.quote(of.model)}}}",
            FUNCTIONS % {"boot": BOOT_SECONDS},
        ]
    )


def _variables(process: Process) -> dict[str, str]:
    return {"head": f"${{nodes[{process.head}]}}", "host": f"${{nodes[{process.machine}]}}", "model": "$model"}


def _machine(of: Layout, machine: int, docker: bool) -> str:
    processes = of.of_machine(machine)
    text = [
        HEADER.rstrip(),
        f"# {of.title}.",
        f"# Machine {machine} of {of.machines}: {', '.join(process.name for process in processes)}",
        "# shellcheck disable=SC2030,SC2031",  # each process has variables of its own
        "set -euo pipefail",
        *SOURCE,
    ]
    for process in processes:
        text += ["", *(_container(of, process) if docker else _bare(of, process)), 'pids+=("$!")']
    text.append("")
    for i, process in enumerate(processes):
        if process.start.serves:
            url = f"http://127.0.0.1:{process.start.port}/health"
            text.append(f'healthy {process.name} {url} "${{pids[{i}]}}"')
    return "\n".join([*text, "run", ""])


def _what(of: Layout, process: Process) -> str:
    start = process.start
    gpus = f", GPUs {_gpus(process)}" if of.gpu else ""
    return f"# {start.role}, replica {start.replica}, node {start.node} of {start.nodes}{gpus}"


def _gpus(process: Process) -> str:
    return ",".join(str(process.first_gpu + i) for i in range(process.start.gpus))


def _bare(of: Layout, process: Process) -> list[str]:
    start, variables = process.start, _variables(process)
    env = dict(start.env)
    if of.gpu:
        env["CUDA_VISIBLE_DEVICES"] = _gpus(process)
    exports = [f"  export {name}={word(value, variables)}" for name, value in env.items()]
    words = [word(part, variables) for part in start.command[: -len(start.arguments) or None]]
    return [_what(of, process), "(", *exports, "  exec " + command(lines(words, start, variables), "  "), ") &"]


def _container(of: Layout, process: Process) -> list[str]:
    start, variables = process.start, _variables(process)
    program, *rest = start.command[: -len(start.arguments) or None]
    options = ["--rm", f"--name {of.name}-{process.name}", "--network host", "--ipc host"]
    options += ["--ulimit memlock=-1", "--ulimit stack=67108864", "--cap-add IPC_LOCK"]
    if of.gpu:
        options.append(f"""--gpus '"device={_gpus(process)}"'""")
        if of.spans or of.one_domain:
            options.append("--device /dev/nvidia-caps-imex-channels")
    options.append('--volume "${HF_HOME:-$HOME/.cache/huggingface}:/root/.cache/huggingface"')
    options.append("--env HF_TOKEN")
    options += [f"--env {name}={word(value, variables)}" for name, value in start.env.items()]
    if start.serves:
        url = f"http://127.0.0.1:{start.port}/health"
        options += [f"--health-cmd 'curl --fail --silent {url}'", "--health-interval 10s", "--health-timeout 5s"]
        options.append(f"--health-start-period {BOOT_SECONDS}s")
    program = "python3" if program == "python" else program
    words = [word(part, variables) for part in rest]
    options += [f"--entrypoint {word(program, variables)}", shlex.quote(image(of))]
    return [_what(of, process), command(["docker run", *options, *lines(words, start, variables)], "") + " &"]


def _router(of: Layout, router: list[str], docker: bool) -> str:
    variables = {f"node{_letters(i)}": f"${{nodes[{i}]}}" for i in range(of.machines)}
    words = [word(part, variables) for part in router]
    servers = [process for role in of.plan.roles for process in of.serving(role)]
    waits = [
        f'healthy {process.name} "http://${{nodes[{process.machine}]}}:{process.start.port}/health"'
        for process in servers
    ]
    package = "vllm-router" if router[0] == "vllm-router" else "sglang-router"
    return "\n".join(
        [
            HEADER.rstrip(),
            f"# {of.title}.",
            f"# The router, which needs `pip install {package}`; it listens on port {ROUTER_PORT}.",
            "set -euo pipefail",
            *SOURCE,
            *waits,
            command(_pairs(words), "") + " &",
            'pids+=("$!")',
            f'healthy router http://127.0.0.1:{ROUTER_PORT}/health "${{pids[0]}}"',
            "run",
            "",
        ]
    )


def _pairs(words: list[str]) -> list[str]:
    """Words by line: an option with its values."""
    out: list[str] = []
    for w in words:
        if w.startswith("--") or not out:
            out.append(w)
        else:
            out[-1] += f" {w}"
    return out


def _letters(number: int) -> str:
    """A number as lower-case letters, for a mark."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))

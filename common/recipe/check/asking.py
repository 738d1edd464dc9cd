"""Have a real engine examine cases, in a process with its own interpreter; the other side is `probe`.

Cases of one engine's version share one process, because importing an engine takes longer than a hundred cases. What
goes wrong (a crash, a time limit, an import that fails) is an answer, never an exception.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold.common.recipe.check.targets import Target
from fourfold.common.settings import cache_dir

PROBE = Path(__file__).with_name("probe.py")
START_LIMIT = 240.0  # seconds for an engine's import and its parser
CASE_LIMIT = 120.0  # seconds for one case
OURS = ("VLLM_", "SGLANG_", "SGL_", "FOURFOLD_", "PYTHON")  # variables of this process that an engine must not see


@dataclass(frozen=True)
class Case:
    """One process of a recipe, to be examined.

    Attributes:
        options: option to its arguments, in order.
        values: option to the value that the recipe gives it.
        env: variables.
        machine: name, capability, memory in bytes and count of GPUs of a node; None: the machine here.
        resolve: go on to the configuration after the parser.
    """

    id: str
    model: str
    options: Mapping[str, Sequence[str]]
    values: Mapping[str, Any]
    env: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] | None = None
    resolve: bool = True


@dataclass
class Answers:
    """What an engine said.

    Attributes:
        cases: case to its answer: ``refused``, ``abbreviated``, ``resolution``; or ``failed``, why there is none.
        facts: known variables, and more where asked for.
        fatal: why the engine could not be asked at all.
        log: end of the engine's output.
    """

    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    ready: dict[str, Any] = field(default_factory=dict)
    fatal: str | None = None
    log: str = ""


def ask(
    target: Target,
    cases: Sequence[Case],
    facts: Mapping[str, Any] | None = None,
    base_env: Mapping[str, str] | None = None,
    limit: float = CASE_LIMIT,
    start_limit: float = START_LIMIT,
) -> Answers:
    """Have ``target`` examine ``cases``, which are all of the same machine or all of none.

    Args:
        facts: ``names``: variables to look up in the sources; ``all``: everything, for a snapshot.
        base_env: variables that the engine needs from its start.
        limit: seconds for one case.
        start_limit: seconds until the first case.
    """
    answers = Answers()
    if target.python is None:
        answers.fatal = f"{target.label} is not installed here"
        return answers
    machine = next((case.machine for case in cases), None)
    request = {
        "engine": target.engine,
        "machine": dict(machine) if machine is not None else None,
        "facts": dict(facts) if facts is not None else None,
        "timeout": limit,
        "cases": [
            {
                "id": case.id,
                "model": case.model,
                "options": [[name, list(arguments)] for name, arguments in case.options.items()],
                "values": dict(case.values),
                "env": dict(case.env),
                "machine": dict(case.machine) if case.machine is not None else None,
                "resolve": case.resolve,
            }
            for case in cases
        ],
    }
    with tempfile.TemporaryDirectory(prefix="fourfold-check-") as folder:
        _run(target, request, Path(folder), answers, base_env or {}, start_limit + limit * len(cases))
    reason = answers.fatal or "the engine ended before it answered"
    for case in cases:
        answers.cases.setdefault(case.id, {"failed": reason})
    return answers


def _run(
    target: Target, request: Any, folder: Path, answers: Answers, base_env: Mapping[str, str], limit: float
) -> None:
    asked, answered, log = folder / "request.json", folder / "answers.jsonl", folder / "log.txt"
    asked.write_text(json.dumps(request))
    answered.touch()
    env = _environment(target, folder, request["machine"] is not None) | dict(base_env)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(target.python), str(PROBE), str(asked), str(answered)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            cwd=folder,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            answers.fatal = f"{target.label} did not finish in {limit:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    for line in answered.read_text().splitlines():
        try:
            answer = json.loads(line)
        except ValueError:  # the last line of a process that was killed
            continue
        if "id" in answer:
            answers.cases[answer.pop("id")] = answer
        elif "facts" in answer:
            answers.facts = answer["facts"]
        elif "ready" in answer:
            answers.ready = answer["ready"]
        elif "fatal" in answer:
            answers.fatal = answer["fatal"]
    answers.log = log.read_bytes()[-12000:].decode(errors="replace")
    if answers.fatal is None and not answers.ready:
        last = answers.log.strip().splitlines()[-1:] or [""]
        answers.fatal = f"{target.label} ended with status {process.returncode} before it could be asked: {last[0]}"


def _environment(target: Target, folder: Path, simulated: bool) -> dict[str, str]:
    """Variables of the engine's process: none of ours, no network, no GPU, caches apart from real runs."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    if simulated:
        env["CUDA_VISIBLE_DEVICES"] = ""
    if target.engine == "vllm":
        # vLLM keeps what it learns of a model's class; on a simulated machine that is another class.
        kind = "simulated" if simulated else "here"
        env["VLLM_CACHE_ROOT"] = str(cache_dir() / "check" / f"vllm-{target.version}-{kind}")
    if target.source is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(target.source), str(_metadata(target, folder))])
    return env


def _metadata(target: Target, folder: Path) -> Path:
    """A folder with the metadata of an engine that is unpacked, not installed.

    vLLM 0.33 takes its platform from the version of the distribution ``vllm``, and ``cpu`` in it.
    """
    version = f"{target.version}+cpu"
    info = folder / "metadata" / f"{target.engine}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {target.engine}\nVersion: {version}\n")
    return info.parent

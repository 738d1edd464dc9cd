"""Run vLLM engines one after the other in this process: ``engine_runs.py CASES.json RESULTS.json``.

A case has ``model``, ``options`` of ``vllm.LLM`` and ``requests``, each with ``prompt`` and sampling parameters. With
``step_seconds``, by the number of tokens that the head drafted, fourfold sees steps of that duration, whatever else the
machine does. Its result has the ``tokens`` of each request, vLLM's own speculation counters, the drafts that were
``proposed`` in each step, the draft model's ``class``, the ``totals`` and ``metrics`` of a hybrid worker, or the
``error`` that the engine raised. A case with ``config`` starts no engine: its worker gets a configuration with those
values, and one with ``environment`` those variables.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COUNTERS = {
    "vllm:spec_decode_num_drafts": "steps",
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted",
    "vllm:num_preemptions": "preemptions",
}
OPTIONS = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "dtype": "bfloat16", "seed": 0}
OPTIONS |= {"num_gpu_blocks_override": 128}  # of 128 tokens; a larger cache is cleared for nothing
collect = gc.collect


def hasten() -> None:
    """Leave out what only one engine, or one that may not see its GPU yet, needs.

    `clean_up` alone looks for garbage: an engine does ten times, among all objects of this process. A class of models
    that this machine's cache does not know is looked at here, not in a process that imports vLLM for it.
    """
    from vllm.model_executor.models import registry

    gc.collect = lambda generation=2: 0
    registry._run_in_subprocess = lambda look: look()


def clean_up() -> None:
    """Leave nothing of an engine, also one that failed, to the next: its groups are those of its model."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    collect()


def refusal(case: dict[str, Any]) -> dict[str, Any]:
    """What a worker says to a configuration that this machine's engine would not make."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.import_utils import resolve_obj_by_qualname

    config = EngineArgs(case["model"], **{**OPTIONS, **case["options"]}).create_engine_config()
    for path, value in case["config"].items():
        group, name = path.split(".")
        setattr(getattr(config, group), name, value)
    os.environ |= case.get("environment", {})
    try:
        worker = resolve_obj_by_qualname(case["options"]["worker_cls"])(config, 0, 0, "", True)
        return {"error": f"none: {worker} takes it"}
    finally:
        for name in case.get("environment", {}):
            del os.environ[name]


def run(case: dict[str, Any]) -> dict[str, Any]:
    from prometheus_client import REGISTRY, generate_latest
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from fourfold.vllm_ext import hybrid_worker, mtp_scheduler

    now = 0.0
    clock = SimpleNamespace(perf_counter=lambda: now) if "step_seconds" in case else time
    mtp_scheduler.time = hybrid_worker.time = clock
    llm: Any = LLM(case["model"], **{**OPTIONS, **case["options"]}, disable_log_stats=False)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner, hybrid = worker.model_runner, getattr(worker, "hybrid", None)
    proposed: list[Any] = []
    result: dict[str, Any] = {"proposed": proposed}
    if case["options"].get("speculative_config"):
        drafter = runner.drafter
        propose, result["class"] = drafter.propose, type(drafter.model).__name__

        def keep(*args: Any, **kwargs: Any) -> Any:
            drafts = propose(*args, **kwargs)
            proposed.append(drafts.tolist())
            return drafts

        drafter.propose = keep
    if "step_seconds" in case:
        draft = runner.propose_draft_token_ids

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal now
            drafts = draft(*args, **kwargs)
            now += case["step_seconds"][drafts.shape[1] if hybrid is None else hybrid.count]
            return drafts

        runner.propose_draft_token_ids = timed
    prompts = [{"prompt_token_ids": request.pop("prompt")} for request in case["requests"]]
    for request in case["requests"]:
        if "regex" in request:
            request["structured_outputs"] = StructuredOutputsParams(regex=request.pop("regex"))
    sampling = [SamplingParams(ignore_eos=True, detokenize=False, **request) for request in case["requests"]]
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    result["tokens"] = [list(answer.outputs[0].token_ids) for answer in answers]
    for metric in llm.get_metrics():
        name = COUNTERS.get(metric.name)
        if name:
            result[name] = metric.values if hasattr(metric, "values") else metric.value
    if "HybridWorker" in case["options"].get("worker_cls", ""):
        (result["totals"],) = llm.collective_rpc("draft_totals")
        lines = generate_latest(REGISTRY).decode().splitlines()
        result["metrics"] = [line for line in lines if line.startswith("fourfold:")]
    llm.llm_engine.engine_core.shutdown()
    return result


def run_all(folder: Path, cases: dict[str, Any], cores: str, timeout: int = 900) -> dict[str, Any]:
    """The results of ``cases``, run in a process of its own, and its log under ``log``; both are kept in ``folder``."""
    (folder / "cases.json").write_text(json.dumps(cases))
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
    }
    with (folder / "log").open("w") as log:
        command = [sys.executable, __file__, str(folder / "cases.json"), str(folder / "results.json")]
        subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **env}, check=True, timeout=timeout)
    return json.loads((folder / "results.json").read_text()) | {"log": (folder / "log").read_text()}


def main() -> None:
    hasten()
    results = {}
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        print(f"CASE {name}", flush=True)
        try:
            results[name] = refusal(case) if "config" in case else run(case)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        clean_up()
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()

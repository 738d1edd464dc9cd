"""Run vLLM engines whose draft lengths are given: ``deferred_runs.py CASES.json RESULTS.json``.

A case has ``model``, ``options`` of ``vllm.LLM``, ``lengths``, those of the steps (the last goes on), and ``requests``,
each with ``prompt``, sampling parameters, the step at which it may ``start`` and that at which it is ``aborted``. Its
result has the ``tokens`` and ``logprobs`` of each request, vLLM's counters, ``reads``: positions that the head read in
each forward pass by the step, ``fed``: the steps in which its feed-forward part ran, and, where the options say how
large the KV cache is, ``cache``: a file with that of the head when all was read, and ``blocks``, those of it that
further requests may read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from engine_runs import COUNTERS, OPTIONS, clean_up, hasten


class Lengths:
    """What the scheduler asks for the number of tokens to draft, once a step."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.step = -1

    def __getitem__(self, batch: int) -> int:
        self.step += 1
        return self.lengths[min(self.step, len(self.lengths) - 1)]


def run(case: dict[str, Any], cache: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm: Any = LLM(case["model"], **{**OPTIONS, **case["options"]}, disable_log_stats=False)
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    drafter, runner = worker.model_runner.drafter, worker.model_runner
    lengths = core.scheduler.dynamic_sd_lookup = Lengths(case["lengths"])
    core.scheduler.draft_length = None
    reads: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        reads.append((lengths.step, len(kwargs["input_ids"])))

    drafter.model.register_forward_pre_hook(note, with_kwargs=True)
    fed: list[int] = []
    drafter.model.model.layers[0].block.mlp.register_forward_pre_hook(lambda *_: fed.append(lengths.step))
    waiting = {str(i): request for i, request in enumerate(case["requests"])}
    aborts = {name: request.pop("aborted") for name, request in waiting.items() if "aborted" in request}
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    internal: dict[str, str] = {}
    while waiting or engine.has_unfinished_requests():
        step = max(lengths.step, 0)
        if not engine.has_unfinished_requests():  # nothing is going to count steps
            step = max(step, min(request.get("start", 0) for request in waiting.values()))
        for name in [name for name, request in waiting.items() if request.get("start", 0) <= step]:
            request = {key: value for key, value in waiting.pop(name).items() if key != "start"}
            prompt = {"prompt_token_ids": request.pop("prompt")}
            params = SamplingParams(ignore_eos=True, detokenize=False, **request)
            internal[name] = engine.add_request(name, prompt, params) or name
        for name in [name for name, step in aborts.items() if step <= lengths.step]:
            aborts.pop(name)
            engine.abort_request([internal[name]], internal=internal[name] != name)
        for answer in engine.step():
            out = answer.outputs[0]
            tokens[answer.request_id] = list(out.token_ids)
            if out.logprobs:
                chosen = zip(out.logprobs, out.token_ids, strict=True)
                logprobs[answer.request_id] = [place[token].logprob for place, token in chosen]
    deferred = getattr(worker, "deferred", None)
    if deferred is not None:
        deferred.catch_up()
    result: dict[str, Any] = {"tokens": tokens, "logprobs": logprobs, "reads": reads, "fed": fed, "cache": str(cache)}
    if "num_gpu_blocks_override" in case["options"]:  # else it is large
        (layer,) = drafter._draft_attn_layer_names
        torch.save(runner.compilation_config.static_forward_context[layer].kv_cache, cache)
        pool = core.scheduler.kv_cache_manager.block_pool
        result["blocks"] = [block.block_id for block in pool.blocks if block.block_hash is not None]
    result["deferred"] = deferred is not None
    for metric in llm.get_metrics():
        name = COUNTERS.get(metric.name) or {"vllm:prefix_cache_hits": "hits"}.get(metric.name)
        if name:
            result[name] = metric.values if hasattr(metric, "values") else metric.value
    core.shutdown()
    return result


def main() -> None:
    hasten()
    results = {}
    for i, (name, case) in enumerate(json.loads(Path(sys.argv[1]).read_text()).items()):
        print(f"CASE {name}", flush=True)
        try:
            results[name] = run(case, Path(sys.argv[2]).parent / f"{i}.pt")
        except Exception as error:
            import traceback

            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        clean_up()
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()

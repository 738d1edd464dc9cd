"""Rows of `fourfold.common.compat` for what fourfold changes in vLLM's engine and worker processes."""

from __future__ import annotations

from functools import partial

from fourfold.common.seam import Seam, vllm

_CHUNKS = "vLLM leaves Python 3.11 and 3.12, whose data stack python/cpython issue 142183 is about"
_MESSAGES = "vLLM's workers send drafts with the sampled tokens"
_WORKER = "v1.executor.multiproc_executor:WorkerProc"
_EXECUTOR = "v1.executor.multiproc_executor:MultiprocExecutor"
_vllm = partial(vllm, until=_MESSAGES)

PROCESSES: tuple[Seam, ...] = (
    vllm("v1.engine.core:EngineCoreProc.run_busy_loop", "wrapped: room on Python's data stack", until=_CHUNKS),
    vllm("v1.engine.core:DPEngineCoreProc.run_busy_loop", "wrapped: the same", until=_CHUNKS),
    vllm(f"{_WORKER}.worker_busy_loop", "wrapped: the same", until=_CHUNKS),
    _vllm(f"{_WORKER}.handle_output", "wrapped: adds a step's drafts to its output", ("output",)),
    _vllm(f"{_EXECUTOR}.sample_tokens", "wrapped: keeps them", ("grammar_output", "non_block")),
    _vllm(f"{_EXECUTOR}.take_draft_token_ids", "wrapped: hands them to the engine"),
    _vllm(f"{_WORKER}.use_async_scheduling", "whether it asks for them"),
    _vllm("v1.worker.gpu_worker:Worker.take_draft_token_ids", "the drafts of a step"),
    _vllm("v1.outputs:ModelRunnerOutput", "a step's output"),
)

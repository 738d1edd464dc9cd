"""A step's drafts come to vLLM's engine with the step's sampled tokens.

Without asynchronous scheduling the engine process asks a worker process for the drafts by a message of its own, after
the sampled tokens are there: a round trip that the next step waits for, also where nothing was drafted. Here the
worker adds the drafts to what it sampled, and the executor answers the engine from that. Where a step's output came
another way (pipeline stages, asynchronous scheduling), the engine asks as before.
"""

from __future__ import annotations

import copy
from typing import Any

from fourfold.vllm_ext.when_imported import when_imported

_KEY = "fourfold_draft_token_ids"  # of an output on its way, then of the executor


def attach() -> None:
    """Wrap the worker or executor of this process and of those it forks, called once."""
    when_imported("vllm.v1.executor.multiproc_executor", _wrap)


def _wrap(module: Any) -> None:
    worker, executor = module.WorkerProc, module.MultiprocExecutor
    handle, sample, take = worker.handle_output, executor.sample_tokens, executor.take_draft_token_ids

    def handle_output(self: Any, output: Any) -> None:
        takes = getattr(self.worker, "take_draft_token_ids", None)
        if isinstance(output, module.ModelRunnerOutput) and not self.use_async_scheduling and takes is not None:
            output = copy.copy(output)  # vLLM's empty output is one object for all steps
            setattr(output, _KEY, takes())
        handle(self, output)

    def sample_tokens(self: Any, grammar_output: Any, non_block: bool = False) -> Any:
        output = sample(self, grammar_output, non_block)
        self.__dict__.pop(_KEY, None)
        if _KEY in getattr(output, "__dict__", {}):
            setattr(self, _KEY, output.__dict__.pop(_KEY))
        return output

    def take_draft_token_ids(self: Any) -> Any:
        return self.__dict__.pop(_KEY) if _KEY in self.__dict__ else take(self)

    worker.handle_output = handle_output
    executor.sample_tokens, executor.take_draft_token_ids = sample_tokens, take_draft_token_ids

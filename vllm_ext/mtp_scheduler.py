"""``--scheduler-cls fourfold.vllm_ext.mtp_scheduler.AdaptiveScheduler``: the number of draft tokens, learned.

vLLM looks the number up by batch size in a table, ``num_speculative_tokens_per_batch_size`` of the speculative config;
here `DraftLength` answers instead. The table must be there, so that vLLM prepares for lengths below
``num_speculative_tokens``: ``[[1, MAX_NUM_SEQS, K]]`` does. Where drafting does not pay, nothing is drafted; with
``--worker-cls fourfold.vllm_ext.adaptive_worker.AdaptiveWorker`` that costs next to nothing.

Under data parallelism vLLM drops the table, since its ranks would draft different numbers, and this scheduler is vLLM's
own. With the setting ``mtp.adaptive_data_parallel`` the ranks agree on one number (`Agreement`) in every
``--dp-sync-interval``-th step, where vLLM's ranks ask each other whether any has requests left:

    --data-parallel-size N --scheduler-cls fourfold.vllm_ext.mtp_scheduler.AdaptiveScheduler
    --worker-cls fourfold.vllm_ext.adaptive_worker.AdaptiveWorker
    --additional-config '{"fourfold": {"mtp": {"adaptive_data_parallel": true}}}'

It needs no table. Ranks of a model without experts are independent, and so are their lengths. vLLM's V1 model runner
only, without full CUDA graphs, with which the number of verified tokens is fixed.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from vllm import envs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import DPEngineCoreProc

from fourfold.common.errors import FourfoldError
from fourfold.common.log import get_logger
from fourfold.common.mtp.agreement import Agreement
from fourfold.common.mtp.draft_length import DraftLength, Policy
from fourfold.common.settings import additional_settings
from fourfold.vllm_ext.deferred_head import only_decodes

WORKER = "fourfold.vllm_ext.adaptive_worker.AdaptiveWorker"


class _Lookup:
    """What the scheduler indexes with the number of requests, once a step."""

    def __init__(self, length: DraftLength | Agreement) -> None:
        self.length = length

    def __getitem__(self, batch: int) -> int:
        return self.length.k if isinstance(self.length, Agreement) else self.length.choose(batch)


class AdaptiveScheduler(AsyncScheduler):
    """vLLM's scheduler with `DraftLength`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draft_length: DraftLength | Agreement | None = None
        self._scheduled: deque[tuple[SchedulerOutput, float]] = deque()  # what is being executed, and since when
        self._updated = 0.0
        self._verified: list[tuple[int, int]] = []
        ranks = self.parallel_config.data_parallel_size
        allowed = additional_settings(self.vllm_config.additional_config).mtp.adaptive_data_parallel
        if allowed:
            check_ranks(self.vllm_config)
        if ranks > 1 and allowed:
            self.draft_length = Agreement(Policy(self.num_spec_tokens))
            _hook_engine()
            get_logger(__name__).info("fourfold: %d data-parallel ranks agree on the number of draft tokens", ranks)
        elif ranks > 1:
            get_logger(__name__).info(
                "fourfold: under data parallelism the number of draft tokens stays fixed; "
                "mtp.adaptive_data_parallel lets the ranks agree on it"
            )
        elif self.dynamic_sd_lookup is not None or allowed:
            self.draft_length = DraftLength(Policy(self.num_spec_tokens))
        else:
            raise FourfoldError(
                "AdaptiveScheduler: --speculative-config needs num_speculative_tokens_per_batch_size, "
                f"for instance [[1, {self.scheduler_config.max_num_seqs}, {self.num_spec_tokens}]], "
                "or, under data parallelism, the setting mtp.adaptive_data_parallel"
            )
        if self.draft_length is not None:
            self.dynamic_sd_lookup = _Lookup(self.draft_length)  # type: ignore[assignment]
            if self.parallel_config.worker_cls != WORKER:
                get_logger(__name__).info(
                    "fourfold: vLLM runs the MTP head also in steps that draft nothing; --worker-cls %s leaves it out",
                    WORKER,
                )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        started = time.perf_counter()
        output = super().schedule(*args, **kwargs)
        self._scheduled.append((output, started))
        return output

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        # vLLM calls this for each request whose draft was verified; a grammar may have cut the draft before.
        drafted = num_draft_tokens - (num_invalid_spec_tokens or {}).get(request_id, 0)
        self._verified.append((drafted, num_accepted_tokens))
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
        )

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        self._verified.clear()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        started = 0.0
        while self._scheduled:
            output, started = self._scheduled.popleft()
            if output is scheduler_output:
                break
        now = time.perf_counter()
        if self.draft_length is not None and scheduler_output.num_scheduled_tokens:
            # A step that was scheduled while another ran started when that one ended.
            seconds = now - max(started, self._updated) if _is_steady(scheduler_output) else None
            drafted, batch = scheduler_output.num_spec_tokens_to_schedule, len(scheduler_output.num_scheduled_tokens)
            self.draft_length.observe(batch, drafted, self._verified, seconds)
        self._updated = now
        return outputs


def _is_steady(output: SchedulerOutput) -> bool:
    """Whether all requests of a step decode, and verify as many tokens as they draft."""
    tokens, drafted = output.scheduled_spec_decode_tokens, output.num_spec_tokens_to_schedule
    return only_decodes(output) and all(len(tokens.get(r, ())) == drafted for r in output.num_scheduled_tokens)


def check_ranks(vllm_config: Any) -> None:
    """Refuse what ranks could not agree on or not keep to; of independent ranks, what fixes the length."""
    parallel, problem = vllm_config.parallel_config, ""
    agree = parallel.data_parallel_size > 1
    if agree and parallel.worker_cls != WORKER:
        problem = f"--worker-cls is {parallel.worker_cls!r}; expected {WORKER}"
    elif agree and parallel.enable_elastic_ep:
        problem = "--enable-elastic-ep: a rank that joins knows nothing of what the others agreed on; leave it out"
    elif vllm_config.use_v2_model_runner:
        problem = "the V2 model runner prepares for no other length; set VLLM_USE_V2_MODEL_RUNNER=0"
    elif vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        problem = "full CUDA graphs verify a fixed number of tokens; add --compilation-config.cudagraph_mode PIECEWISE"
    if problem:
        raise FourfoldError(f"mtp.adaptive_data_parallel: {problem}")


def _hook_engine() -> None:
    """Let the engine's process, where all ranks are at the same step, exchange rows and tell the length to workers."""
    if hasattr(DPEngineCoreProc._has_global_unfinished_reqs, "__wrapped__"):
        return
    finish = DPEngineCoreProc._has_global_unfinished_reqs

    def has_global_unfinished_reqs(core: Any, local_unfinished: bool) -> bool:
        unfinished = finish(core, local_unfinished)
        if core.step_counter == 1 or core.step_counter % core.dp_sync_interval == 0:  # as `finish` counts
            agreement = core.scheduler.draft_length
            row = torch.tensor(agreement.row(), dtype=torch.float64)
            rows = torch.zeros(core.dp_size, len(row), dtype=torch.float64)
            rows[core.dp_rank] = row
            torch.distributed.all_reduce(rows, group=core.dp_group)
            agreement.agree(rows.tolist())
        return unfinished

    def execute_dummy_batch(core: Any) -> None:
        timeout, k = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS, core.scheduler.draft_length.k
        core.model_executor.collective_rpc("execute_dummy_batch", timeout, (k,))

    has_global_unfinished_reqs.__wrapped__ = finish  # type: ignore[attr-defined]
    DPEngineCoreProc._has_global_unfinished_reqs = has_global_unfinished_reqs  # type: ignore[method-assign]
    DPEngineCoreProc.execute_dummy_batch = execute_dummy_batch  # type: ignore[method-assign]

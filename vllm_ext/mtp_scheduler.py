"""``--scheduler-cls fourfold.vllm_ext.mtp_scheduler.AdaptiveScheduler``: the number of draft tokens, learned.

vLLM looks the number up by batch size in a table, ``num_speculative_tokens_per_batch_size`` of the speculative config;
here `DraftLength` answers instead. The table must be there, so that vLLM prepares for lengths below
``num_speculative_tokens``: ``[[1, MAX_NUM_SEQS, K]]`` does. Under data parallelism vLLM drops the table, since its
ranks would draft different numbers, and this scheduler is vLLM's own.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput

from fourfold.common.errors import FourfoldError
from fourfold.common.log import get_logger
from fourfold.common.mtp.draft_length import DraftLength, Policy


class _Lookup:
    """What the scheduler indexes with the number of requests, once a step."""

    def __init__(self, length: DraftLength) -> None:
        self.length = length

    def __getitem__(self, batch: int) -> int:
        return self.length.choose(batch)


class AdaptiveScheduler(AsyncScheduler):
    """vLLM's scheduler with `DraftLength`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draft_length: DraftLength | None = None
        self._scheduled: deque[tuple[SchedulerOutput, float]] = deque()  # what is being executed, and since when
        self._updated = 0.0
        self._verified: list[tuple[int, int]] = []
        if self.dynamic_sd_lookup is not None:
            self.draft_length = DraftLength(Policy(self.num_spec_tokens))
            self.dynamic_sd_lookup = _Lookup(self.draft_length)  # type: ignore[assignment]
        elif self.parallel_config.data_parallel_size > 1:
            get_logger(__name__).info("fourfold: under data parallelism the number of draft tokens stays fixed")
        else:
            raise FourfoldError(
                "AdaptiveScheduler: --speculative-config needs num_speculative_tokens_per_batch_size, "
                f"for instance [[1, {self.scheduler_config.max_num_seqs}, {self.num_spec_tokens}]]"
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
    drafted = output.num_spec_tokens_to_schedule
    tokens = output.scheduled_spec_decode_tokens
    return not output.scheduled_new_reqs and all(
        len(tokens.get(request, ())) == drafted and count == drafted + 1
        for request, count in output.num_scheduled_tokens.items()
    )

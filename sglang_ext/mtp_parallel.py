"""A learned draft length under attention data parallelism: ranks agree on what they learn from.

SGLang's ``--speculative-adaptive`` learns the length on each rank alone and switches itself off where
``--attn-dp-size`` is above 1, for ranks that take part in each other's collectives have to draft the same number of
tokens. With the setting ``mtp.adaptive_data_parallel`` it stays on:

    FOURFOLD_CONFIG='{"mtp": {"adaptive_data_parallel": true}}' python -m sglang.launch_server
    --speculative-algorithm EAGLE --speculative-adaptive --attn-dp-size N --tp-size N

Before every step SGLang's ranks gather how many tokens each of them has. Their rows carry three numbers more: what the
rank verified since the last time. SGLang's own policy, a pure function of what it is told, hears the sum of all rows,
and of the largest batch; so all ranks draw the same conclusion at the same step, without a collective of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.environ import envs
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import attn_dp_enabled_of, get_parallel
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.log import get_logger
from fourfold.sglang_ext.hooks import install

_GATHER = "sglang.srt.managers.scheduler_components.dp_attn.MLPSyncBatchInfo"
_COLUMNS = 3
_RANKS_ALONE = "attention DP"  # how SGLang's reason begins where nothing that it checks first speaks against it
_REFUSED = {
    "enable_multi_layer_eagle": "SGLang's worker for several modules drafts a fixed number of tokens",
    "enable_two_batch_overlap": "SGLang does not exchange the attention of overlapped batches",
    "enable_pdmux": "SGLang does not exchange the attention of multiplexed prefill and decode",
    "elastic_ep_backend": "a rank that joins knows nothing of what the others learned",
}
_VARIABLES = {
    "SGLANG_SCHEDULER_SKIP_ALL_GATHER": "ranks do not ask each other how many tokens they have",
    "SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION": "steps in which some ranks prefill do not choose a length",
}


class Agreed:
    """SGLang's policy of draft lengths (``AdaptiveSpecPolicy``), told what all ranks saw.

    Attributes:
        batch: requests of the rank that has most, in the step about to run.
    """

    def __init__(self, policy: Any) -> None:
        self.policy, self.batch = policy, 1
        self._seen = [0] * _COLUMNS

    @property
    def candidate_steps(self) -> list[int]:
        return self.policy.candidate_steps

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self.policy.set_cuda_graph_bs(cuda_graph_bs)

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return self.policy.cuda_graph_bs_for_step(step)

    def get_steps_for_batch(self, batch_size: int) -> int:
        """The length, whatever ``batch_size`` this rank has."""
        return self.policy.get_steps_for_batch(self.batch)

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> None:
        """Keep a step of this rank for the next row; nothing changes until all know of it."""
        requests, correct, largest = self._seen
        good = sum(num_correct_drafts_per_req)
        self._seen = [requests + len(num_correct_drafts_per_req), correct + good, max(largest, batch_size)]

    def row(self) -> list[int]:
        """[3] verified requests, accepted tokens and largest batch of this rank since it was last asked."""
        seen, self._seen = self._seen, [0] * _COLUMNS
        return seen

    def agree(self, rows: Sequence[Sequence[int]], batch: int) -> None:
        """Learn from the rows of all ranks; ``batch`` is 0 where no rank decodes next."""
        requests, correct, largest = (list(column) for column in zip(*rows, strict=True))
        if sum(requests):
            self.policy.on_verify_complete([sum(correct) / sum(requests)], max(largest))
        self.batch = batch or self.batch


_agreed: list[Agreed] = []  # of this process, which has one worker at most


def register() -> None:
    """Keep SGLang's learned length on under attention data parallelism.

    Raises:
        FourfoldError: as `install`.
    """
    install({"sglang.srt.speculative.adaptive_spec_params.adaptive_unsupported_reason": _reason}, HookType.AROUND)
    install({"sglang.srt.speculative.adaptive_runtime_state.AdaptiveController.__init__": _begin}, HookType.AFTER)


def _reason(original: Callable[[Any], str | None], server_args: Any) -> str | None:
    """Why the length stays fixed; None where the ranks agree on it.

    Raises:
        FourfoldError: they could not, or SGLang cannot vary it for another reason.
    """
    reason, options = original(server_args), resolved_view(server_args)
    if not attn_dp_enabled_of(options):
        return reason
    problem = "" if reason is None or reason.startswith(_RANKS_ALONE) else reason
    for name, why in _REFUSED.items():
        if getattr(options, name):
            problem = problem or f"--{name.replace('_', '-')}: {why}; leave it out"
    if options.pp_size > 1:
        problem = problem or f"--pp-size {options.pp_size}: stages without a draft verify nothing; use 1"
    for name, why in _VARIABLES.items():
        if getattr(envs, name).get():
            problem = problem or f"{name}={os.environ[name]}: {why}; unset it"
    if problem:
        raise FourfoldError(f"mtp.adaptive_data_parallel: {problem}")
    return None


def _begin(result: None, controller: Any, *_: Any, **__: Any) -> None:
    """Let the policy of a new worker hear what all ranks saw."""
    if not get_parallel().attn_dp_enabled:
        return
    controller.params = agreed = Agreed(controller.params)
    _agreed[:] = [agreed]
    more = {"_get_local_tensor": _local_row, "_get_fallback_tensor": _empty_row, "all_gather": _agree}
    install({f"{_GATHER}.{name}": hook for name, hook in more.items()}, HookType.AFTER)
    get_logger(__name__).info(
        "fourfold: %d data-parallel ranks agree on the number of draft tokens", get_parallel().attn_dp_size
    )


def _local_row(row: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.cat([row, row.new_tensor(_agreed[0].row())])


def _empty_row(row: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.cat([row, row.new_zeros(_COLUMNS)])


def _agree(result: None, gathered: Any, *_: Any, **__: Any) -> None:
    batch = 0 if gathered.is_extend_in_batch else max(gathered.global_num_tokens)
    _agreed[0].agree(gathered.tp0_info_cpu[:, -_COLUMNS:].tolist(), batch)

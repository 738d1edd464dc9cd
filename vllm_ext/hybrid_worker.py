"""``--worker-cls fourfold.vllm_ext.hybrid_worker.HybridWorker``: drafts from a request's own text, or its MTP head.

    vllm serve MODEL --no-async-scheduling --worker-cls fourfold.vllm_ext.hybrid_worker.HybridWorker
        --speculative-config '{"method": "mtp", "model": DRAFT_DIRECTORY, "num_speculative_tokens": 8}'
        --additional-config '{"fourfold": {"mtp": {"hybrid": {"min_match": 4, "head_tokens": 3}}}}'

``num_speculative_tokens`` is the longest draft of either source, ``head_tokens`` the head's; with ``learn_head``, the
default, it drafts as many of them as pay at that batch size, or none. Where it drafts nothing, or all requests draft
from their text, it is left out, and reads later what it missed (`deferred_head`), unless something forbids: the log
says what. The text is looked up on the host, after each step's tokens: hence no asynchronous scheduling, which CPUs
never have.

vLLM's V1 model runner only, the one of CPUs: on a GPU set ``VLLM_USE_V2_MODEL_RUNNER=0``. `FourfoldError` names what
else does not fit. The counts by source are in ``/metrics`` (`fourfold.common.mtp.metrics`), and what
``collective_rpc("draft_totals")`` returns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from fourfold.vllm_ext.platform_worker import Worker  # the first of vLLM

# isort: split

import numpy as np
from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.sample.rejection_sampler import RejectionSampler

from fourfold.common.errors import FourfoldError
from fourfold.common.log import get_logger
from fourfold.common.mtp import metrics
from fourfold.common.mtp.agreement import slowest
from fourfold.common.mtp.draft_length import DraftLength, Policy
from fourfold.common.mtp.hybrid import READ, HybridDrafts
from fourfold.common.settings import HybridSettings, additional_settings
from fourfold.vllm_ext.deferred_head import DeferredHead, defer, only_decodes


class HybridDrafting:
    """Drafts of one V1 model runner: takes its place between sampling and the head.

    Attributes:
        most: longest draft of the head.
        count: what it drafted when last asked.
    """

    def __init__(self, runner: Any, settings: HybridSettings, deferred: DeferredHead | None, reports: bool) -> None:
        self.settings = settings
        self.drafts = HybridDrafts(settings)
        self.most = min(settings.head_tokens, runner.num_spec_tokens)
        self.length = DraftLength(Policy(self.most)) if settings.learn_head else None
        self._reports = reports and metrics.enable()
        self._runner, self._deferred = runner, deferred
        self._sampled: list[list[int]] = []  # by row of the batch: this step's tokens, none while a prompt is read
        self._accepted: list[int] = []  # by row: how many of them were drafted, or padded with
        self._asked: tuple[int, set[str]] | None = None  # how many requests there were, for which the head drafts
        self.count = 0
        self._since: float | None = None  # when a step was sampled that did nothing but decode
        self._update, self._propose = runner._update_states_after_model_execute, runner.propose_draft_token_ids
        runner._update_states_after_model_execute = self.update
        runner.propose_draft_token_ids = self.propose

    def update(self, output_token_ids: Any, scheduler_output: Any) -> None:
        """Take note of what a step verified; the runner calls it in each step that sampled, before drafting."""
        self._update(output_token_ids, scheduler_output)
        runner, batch = self._runner, self._runner.input_batch
        incomplete = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0]
        with gpu_sync_allowed():
            self._sampled, _ = RejectionSampler.parse_output(output_token_ids, batch.vocab_size, incomplete.tolist())
        verified = scheduler_output.scheduled_spec_decode_tokens
        # vLLM pads drafts with -1.
        drafted = [sum(token >= 0 for token in verified.get(request, ())) for request in batch.req_ids]
        self._accepted = [max(len(tokens) - 1, 0) for tokens in self._sampled]
        good = list(map(min, self._accepted, drafted))
        if self.length is not None:
            self._learn(self.length, scheduler_output, list(zip(batch.req_ids, drafted, good, strict=True)))
        if scheduler_output.finished_req_ids:
            self.drafts.retain(runner.requests)
        left = READ
        for row, (request, tokens) in enumerate(zip(batch.req_ids, self._sampled, strict=True)):
            if tokens:
                self.drafts.verified(request, drafted[row], good[row])
            # Prompts are known before the model has read them.
            left -= self.drafts.observe(request, batch.token_ids_cpu[row, : batch.num_tokens_no_spec[row]], left)
            self.drafts.append(request, tokens)
        if self._reports:
            metrics.publish(self.drafts.totals())

    def propose(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
        """The drafts by row of the batch, in place of the head's alone."""
        limit = scheduler_output.num_spec_tokens_to_schedule
        rows = list(zip(self._runner.input_batch.req_ids, self._sampled, strict=True))
        texts = [self._text(request, limit) if tokens else [] for request, tokens in rows]
        headed = {request for (request, tokens), text in zip(rows, texts, strict=True) if tokens and not text}
        count = 0
        if headed:
            requests = sum(bool(tokens) for _, tokens in rows)
            count = self.most if self.length is None else self.length.choose(requests)
            if count and not self.count:  # it first reads what it missed: no measure of a draft
                self._since = None
            self._asked, self.count = (requests, headed), count
        if self._deferred is not None:
            kwargs["accepted"] = self._accepted
        drafts = self._propose(
            replace(scheduler_output, num_spec_tokens_to_schedule=min(count, limit)), *args, **kwargs
        )
        with gpu_sync_allowed():
            return [text or head for text, head in zip(texts, drafts.tolist(), strict=True)]

    def _learn(self, length: DraftLength, output: Any, rows: Sequence[tuple[str, int, int]]) -> None:
        """Report what the head's drafts came to; ``rows``: each request with its drafted and its accepted tokens."""
        now, steady = time.perf_counter(), only_decodes(output)
        since, self._since = self._since, now if steady else None
        asked, self._asked = self._asked, None
        if asked is None:
            return
        requests, headed = asked
        seconds = None
        if steady and since is not None:
            seconds = slowest(now - since, get_tp_group().cpu_group)
        head = [(drafted, good) for request, drafted, good in rows if request in headed]
        text = sum(good for request, _, good in rows if request not in headed)
        length.observe(requests, self.count, head, seconds, headless=len(rows) + text)

    def _text(self, request: str, limit: int) -> list[int]:
        draft = self.drafts.propose(request, limit)
        # Images may stand in the text as numbers that are no tokens.
        valid = all(0 <= token < self._runner.input_batch.vocab_size for token in draft)
        return draft if valid else self.drafts.propose(request, 0)


class HybridWorker(Worker):
    """The platform's worker with `HybridDrafting`."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self._settings = additional_settings(vllm_config.additional_config).mtp.hybrid
        _check(vllm_config, self._settings)
        super().__init__(vllm_config, *args, **kwargs)
        self.hybrid: HybridDrafting | None = None
        self.deferred: DeferredHead | None = None

    def init_device(self) -> None:
        super().init_device()
        if not hasattr(self.model_runner, "drafter"):  # the last pipeline stage drafts
            return
        self.deferred, what = defer(self.model_runner)
        # The ranks of a tensor-parallel group draft the same.
        self.hybrid = HybridDrafting(self.model_runner, self._settings, self.deferred, self.is_driver_worker)
        get_logger(__name__).info(
            "fourfold: hybrid drafts: matches of %d tokens or more draft up to %d, the MTP head %s%d elsewhere; "
            "in steps without its drafts it %s",
            self._settings.min_match,
            min(self._settings.max_draft, self.model_runner.num_spec_tokens),
            "up to " if self._settings.learn_head else "",
            self.hybrid.most,
            what,
        )

    def execute_model(self, scheduler_output: Any) -> Any:
        if self.deferred is not None:
            self.deferred.begin(scheduler_output)
        return super().execute_model(scheduler_output)

    def draft_totals(self) -> dict[str, dict[str, Any]]:
        """The counts of `HybridDrafts` by source, as plain dictionaries; empty where this worker drafts nothing."""
        if self.hybrid is None:
            return {}
        return {source: asdict(totals) for source, totals in self.hybrid.drafts.totals().items()}


def _check(vllm_config: Any, settings: HybridSettings) -> None:
    """Refuse configurations in which drafts of two sources would be wrong or late."""
    if not settings.enabled:
        raise FourfoldError("HybridWorker: mtp.hybrid.enabled is false; leave out --worker-cls")
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        name = current_platform.device_name
        raise FourfoldError(f"HybridWorker: platform {name!r}: expected a CPU, CUDA or ROCm; leave out --worker-cls")
    speculative = vllm_config.speculative_config
    method = speculative.method if speculative else None
    if method != "mtp":
        raise FourfoldError(f"HybridWorker: --speculative-config method is {method!r}; expected 'mtp'")
    if vllm_config.use_v2_model_runner:
        raise FourfoldError("HybridWorker: the V2 model runner drafts on the device; set VLLM_USE_V2_MODEL_RUNNER=0")
    if vllm_config.scheduler_config.async_scheduling:
        raise FourfoldError(
            "HybridWorker: asynchronous scheduling drafts before the host knows the text; add --no-async-scheduling"
        )
    if speculative.draft_sample_method != "greedy":
        raise FourfoldError(
            f"HybridWorker: draft_sample_method={speculative.draft_sample_method!r} needs the probabilities of every "
            "drafted token, which those of the text do not have; leave it at 'greedy', which is lossless too"
        )
    if "AdaptiveScheduler" in str(vllm_config.scheduler_config.scheduler_cls):
        raise FourfoldError(
            "HybridWorker: AdaptiveScheduler learns one length for drafts of both sources, where mtp.hybrid.learn_head "
            "learns the head's; leave out --scheduler-cls"
        )
    ranks = vllm_config.parallel_config.data_parallel_size
    if ranks > 1:
        raise FourfoldError(
            f"HybridWorker: data_parallel_size={ranks}: the ranks' heads must run equally often; leave out --worker-cls"
        )

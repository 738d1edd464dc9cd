"""``--worker-cls fourfold.vllm_ext.adaptive_worker.AdaptiveWorker``: steps that draft nothing cost next to nothing.

With `AdaptiveScheduler`. Where it drafts no tokens, sampling is that of a server without speculation, and the head is
left out and reads later what it missed (`deferred_head`), unless something forbids: the log says what.

Under data parallelism a rank without requests runs an empty batch whenever the others run a real one, so that they can
take part in each other's collectives. vLLM drafts the length of this rank's last draft there; here the draft model runs
as often as on the others. vLLM's V1 model runner only.
"""

from __future__ import annotations

from typing import Any

from fourfold.vllm_ext.platform_worker import Worker  # the first of vLLM

# isort: split

from fourfold.common.log import get_logger
from fourfold.vllm_ext.deferred_head import DeferredHead, defer


class AdaptiveWorker(Worker):
    """The platform's worker, told the length of every step's draft."""

    deferred: DeferredHead | None = None

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        if self.use_v2_model_runner or not hasattr(runner, "drafter"):  # the last pipeline stage drafts
            return
        self.deferred, what = defer(runner)
        get_logger(__name__).info("fourfold: in steps without drafts the MTP head %s", what)

    def execute_model(self, scheduler_output: Any) -> Any:
        self._draft(scheduler_output.num_spec_tokens_to_schedule)
        if self.deferred is not None:
            self.deferred.begin(scheduler_output)
        return super().execute_model(scheduler_output)

    def execute_dummy_batch(self, num_spec_tokens: int | None = None) -> None:
        if num_spec_tokens is not None:
            self._draft(num_spec_tokens)
        super().execute_dummy_batch()

    def _draft(self, num_spec_tokens: int) -> None:
        """Set how often an empty step runs the draft model; a draft of no tokens still reads the verified ones."""
        drafter = getattr(self.model_runner, "drafter", None)  # the last pipeline stage drafts
        if drafter is not None:
            drafter.num_speculative_tokens = max(num_spec_tokens, 1)

"""``--worker-cls fourfold.vllm_ext.adaptive_worker.AdaptiveWorker``: empty steps as long as the other ranks' real ones.

A data-parallel rank without requests runs an empty batch whenever the others run a real one, so that they can take part
in each other's collectives. vLLM drafts the length of this rank's last draft there; here the draft model runs as often
as on the others. With `AdaptiveScheduler`, which says how often that is. vLLM's V1 model runner only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker


class AdaptiveWorker(Worker):
    """The platform's worker, told the length of every step's draft."""

    def execute_model(self, scheduler_output: Any) -> Any:
        self._draft(scheduler_output.num_spec_tokens_to_schedule)
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

"""``--speculative-algorithm FOURFOLD_MTP``: SGLang's EAGLE with drafts from a request's text where it repeats.

To SGLang it is EAGLE in all but the name, so what SGLang ties to that name is not there: ``--speculative-adaptive``,
in whose place `mtp_length` learns, rejection sampling and block verification of drafts, LoRA, watermarks, pipeline
parallelism, unified memory, the radix cache of a decode server, NVFP4 KV caches of SM100, and multi-layer EAGLE, which
drafts with several modules of a head. SGLang refuses or drops them itself; rejection sampling and multi-layer EAGLE are
refused here.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo, get_spec

from fourfold.common.errors import FourfoldError
from fourfold.common.settings import ALGORITHM, settings_from_env

_REQUESTS = 48  # SGLang's limit of running requests for EAGLE
_REFUSED = {
    "speculative_use_rejection_sampling": "drafts from the text have no distribution",
    "enable_multi_layer_eagle": "one module drafts",
}


class FourfoldMtp(CustomSpecAlgo):
    """EAGLE's answers, where SGLang's class for registered algorithms has others or none."""

    def is_eagle(self) -> bool:
        return True

    def supports_mixed_chunk(self) -> bool:
        return True

    def supports_grammar_overlap(self) -> bool:
        return True

    def carries_draft_hidden_states(self) -> bool:
        return True

    def need_topk(self) -> bool:
        return True

    def create_future_map(self, *args: Any, **kwargs: Any) -> Any:
        return SpeculativeAlgorithm.EAGLE.create_future_map(*args, **kwargs)

    def build_disagg_draft_input(self, *args: Any, **kwargs: Any) -> Any:
        return SpeculativeAlgorithm.EAGLE.build_disagg_draft_input(*args, **kwargs)

    def handle_server_args(self, server_args: Any) -> None:
        """Set what the command line left open.

        Raises:
            FourfoldError: an option that the worker does not take.
        """
        if server_args.speculative_draft_model_path is None:
            raise FourfoldError(
                f"{ALGORITHM} needs --speculative-draft-model-path; `fourfold mtp extract --engine sglang` writes one"
            )
        for name, reason in _REFUSED.items():
            if getattr(server_args, name):
                raise FourfoldError(f"--{name.replace('_', '-')} does not run with {ALGORITHM}: {reason}; use EAGLE")
        steps = server_args.speculative_num_steps or settings_from_env().mtp.hybrid.head_tokens
        only = {"speculative_num_steps": steps, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": steps + 1}
        for name, value in only.items():
            found = getattr(server_args, name)
            if found not in (None, value):
                raise FourfoldError(
                    f"--{name.replace('_', '-')} {found}: {ALGORITHM} drafts a chain of {steps} tokens; use {value}"
                )
            setattr(server_args, name, value)
        if server_args.max_running_requests is None:
            server_args.max_running_requests = _REQUESTS


def worker_class(server_args: Any) -> type:
    """`MtpWorker` on the worker that this platform uses for EAGLE.

    Raises:
        FourfoldError: that worker is not SGLang's.
    """
    from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

    from fourfold.sglang_ext.mtp_worker import MtpWorker

    base: Any = SpeculativeAlgorithm.EAGLE.create_worker(server_args)
    if base is EAGLEWorkerV2:
        return MtpWorker
    if not issubclass(base, EAGLEWorkerV2):
        raise FourfoldError(f"{ALGORITHM} cannot extend this platform's EAGLE worker, {base.__name__}; use EAGLE")
    return type(MtpWorker.__name__, (MtpWorker, base), {})


def register() -> None:
    """Add the algorithm to SGLang's registry, once; with the setting, let EAGLE's ranks agree on draft lengths.

    Raises:
        FourfoldError: as `mtp_parallel.register`.
    """
    if get_spec(ALGORITHM) is None:
        SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=True, spec_class=FourfoldMtp)(worker_class)
    if settings_from_env().mtp.adaptive_data_parallel:
        from fourfold.sglang_ext import mtp_parallel

        mtp_parallel.register()

"""The platform class of `fourfold.sglang_ext.platform`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import KVPoolKind, PlatformCapabilities, SRTPlatform
from torch import Tensor

from fourfold.common.errors import FourfoldError
from fourfold.common.settings import ALGORITHM

_DEFAULTS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
}
_CHAIN = {
    "speculative_eagle_topk": 1,
    "speculative_use_rejection_sampling": False,
    "speculative_accept_threshold_single": 1.0,
    "speculative_accept_threshold_acc": 1.0,
}


class FourfoldCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Any CPU, without compiled kernels of SGLang: attention, norms and sampling are its PyTorch implementations."""

    _enum = PlatformEnum.OOT
    device_name = "fourfold_cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def init_backend(self) -> None:
        """Let attention take a batch at once, and that of MLA run absorbed, for which Triton's would be asked else."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
        from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

        def create(runner: Any) -> Any:
            from fourfold.sglang_ext.cpu_attention import BatchAttention

            return BatchAttention(runner)

        register_attention_backend("torch_native")(create)
        AttentionBackendRegistry.register("torch_native", lambda attention, forward_batch: AttnForwardMethod.MLA)

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set what the platform needs.

        Raises:
            FourfoldError: an option that SGLang cannot run on a CPU.
        """
        algorithm = server_args.speculative_algorithm
        if algorithm and not self.supports_speculative_algorithm(algorithm.upper()):
            raise FourfoldError(
                f"--speculative-algorithm {algorithm} does not run on fourfold_cpu; use EAGLE or {ALGORITHM}"
            )
        for name, only in _CHAIN.items() if algorithm else ():
            found = getattr(server_args, name)
            if found != only and not (found is None and algorithm.upper() == ALGORITHM):  # which sets it
                flag = name.replace("_", "-")
                raise FourfoldError(f"--{flag} {found} does not run on fourfold_cpu, which drafts chains; use {only}")
        if server_args.ep_size > 1:
            raise FourfoldError(
                f"--ep-size {server_args.ep_size} does not run on fourfold_cpu: SGLang's PyTorch MoE ignores the "
                "expert map; use 1"
            )
        for name, value in _DEFAULTS.items():
            setattr(server_args, name, value)

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in ("EAGLE", "NEXTN", ALGORITHM)

    def get_speculative_worker_cls(self, algorithm: str) -> None:
        """SGLang's own worker; what it launches is replaced when the process that creates it asks."""
        from sglang.srt.runtime_context import get_context

        if get_context().is_config_namespace_published("spec"):
            from fourfold.sglang_ext.speculation import prepare

            prepare()

    def get_speculative_cache_locs_fn(self) -> Callable[..., Tensor]:
        from fourfold.sglang_ext.speculation import extend_slots

        return extend_slots

    def get_kv_pool_cls(self, *, kind: KVPoolKind) -> type | None:
        from sglang.srt.runtime_context import get_spec

        if kind != "mha" or not get_spec().speculative_algorithm:
            return None
        from fourfold.sglang_ext.speculation import ChainPool

        return ChainPool

    def get_device(self, device_id: int = 0) -> str:  # type: ignore[override]
        return "cpu"  # the resolution of --device splits it; the mixin's torch.device cannot be split

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

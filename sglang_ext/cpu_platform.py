"""The platform class of `fourfold.sglang_ext.platform`."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from fourfold.common.errors import FourfoldError

_DEFAULTS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
}


class FourfoldCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Any CPU, without compiled kernels of SGLang: attention, norms and sampling are its PyTorch implementations."""

    _enum = PlatformEnum.OOT
    device_name = "fourfold_cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set what the platform needs.

        Raises:
            FourfoldError: an option that SGLang cannot run on a CPU.
        """
        if server_args.speculative_algorithm:
            raise FourfoldError(
                f"--speculative-algorithm {server_args.speculative_algorithm} does not run on fourfold_cpu: SGLang's "
                "speculation needs Triton kernels; leave it out"
            )
        if server_args.ep_size > 1:
            raise FourfoldError(
                f"--ep-size {server_args.ep_size} does not run on fourfold_cpu: SGLang's PyTorch MoE ignores the "
                "expert map; use 1"
            )
        for name, value in _DEFAULTS.items():
            setattr(server_args, name, value)

    def get_device(self, device_id: int = 0) -> str:  # type: ignore[override]
        return "cpu"  # the resolution of --device splits it; the mixin's torch.device cannot be split

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

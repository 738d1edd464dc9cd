"""A CUDA machine for SGLang 0.5.23 that is not there: facts through SGLang's own ``override_platform``.

Beside that seam, three things ask the driver and are answered from a hardware sheet: the memory's size, the compute
capability that hooks read from torch, and the cached probes of an architecture. No kernel module sees CUDA, so none of
them is loaded. Nothing of SGLang's resolution is replaced.
"""

from __future__ import annotations

from typing import Any

PROBES = ("is_sm90_supported", "is_sm100_supported", "is_sm100_or_sm110_supported", "is_blackwell_supported")
machine: dict[str, Any] = {}


def become(sheet: dict[str, Any]) -> None:
    """Be the machine of ``sheet``: name, capability, memory in bytes, count."""
    machine.clear()
    machine.update(sheet)
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.utils import common

    major, minor = sheet["capability"]
    override_platform(
        is_cuda=True,
        is_sm90=major == 9,
        is_sm100=major == 10,
        is_sm100_or_sm110=major in (10, 11),
        is_blackwell=major in (10, 11, 12),
        is_sm120=major == 12,
        is_hopper_with_cuda_12_3=major == 9,
        has_flashinfer=True,
        device_sm=major * 10 + minor,
        device_capability=(major, minor),
    ).install()
    real = common.is_cuda, common.get_device_sm
    common.is_cuda, common.get_device_sm = lambda: True, lambda: major * 10 + minor
    try:
        for name in PROBES:  # hooks read these, and they keep their first answer
            probe = getattr(common, name)
            probe.cache_clear()
            probe()
    finally:
        common.is_cuda, common.get_device_sm = real


def install(sheet: dict[str, Any]) -> None:
    """Answer for a driver. Before SGLang's hooks are imported."""
    import sglang.srt.platforms as platforms
    import torch
    from sglang.srt.platforms.cuda import CudaSRTPlatform

    platforms._current_platform = CudaSRTPlatform()
    from sglang.srt.utils import common

    torch.cuda.get_device_capability = lambda device=None: tuple(machine["capability"])
    common.get_device_memory_capacity = lambda device=None: machine["memory"] / (1 << 20)
    common.is_mnnvl_fabric_device = lambda: "GB" in machine["name"]
    become(sheet)

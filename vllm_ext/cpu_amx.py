"""AMX for vLLM's attention on CPUs.

Linux ends a process that uses AMX tiles without having asked for them. vLLM's BF16 attention does not ask: it relies on
oneDNN, which does at the first BF16 product of its own, and there is none before attention where the layers are
quantised or small.
"""

from __future__ import annotations

import torch
from vllm.platforms import current_platform


def allow() -> None:
    """Ask for AMX tiles, for all threads of this process, where the processor has them."""
    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()

"""SGLang's CPU reference platform, chosen with ``SGLANG_PLATFORM=fourfold_cpu``.

The stock CPU platform of SGLang 0.5.23 needs a compiled ``sgl_kernel`` for CPUs, which PyPI does not carry, and AMX.
This one serves dense models on any CPU through SGLang's own PyTorch paths.
"""

from __future__ import annotations


def activate() -> str | None:
    """Return the platform's class name where it is asked for; SGLang asks every installed plugin at every start."""
    from fourfold.common.settings import disabled, sglang_platform

    if disabled() or sglang_platform() != "fourfold_cpu":
        return None
    return "fourfold.sglang_ext.cpu_platform:FourfoldCpuPlatform"

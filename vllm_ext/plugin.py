"""What fourfold registers with vLLM: the quantisation method ``fourfold_nvfp4``, through vLLM's own registry.

`register` is the entry point of ``vllm.general_plugins``: vLLM calls it in every process, for every model. It patches
nothing, may be called again, never raises, and logs one line: that it registered, or what is missing and how to fix it.
"""

from __future__ import annotations

import logging

_done = False


def register() -> bool:
    """Register with the vLLM of this process; returns whether fourfold's methods are available."""
    global _done
    log = logging.getLogger("vllm.fourfold")  # vLLM prints records below its own logger only
    try:
        from fourfold.common.settings import disabled

        if disabled():
            return False
        if not _done:
            from fourfold.vllm_ext.quant_config import FourfoldNvfp4Config

            log.info("fourfold: registered --quantization %s", FourfoldNvfp4Config.get_name())
            _done = True
        return True
    except Exception as error:
        # vLLM ends the process when a plugin raises, also where nobody asked for fourfold.
        log.warning(
            "fourfold is off, vLLM goes on without it: %s: %s. `fourfold doctor` shows which vLLM versions fit; "
            "FOURFOLD_DISABLE=1 silences this",
            type(error).__name__,
            error,
        )
        return False

"""What fourfold registers with vLLM, through vLLM's and transformers' own registries.

- The quantisation method ``fourfold_nvfp4``. On a CPU with AMX this asks for AMX, which attention needs (`cpu_amx`).
- The draft model class ``FourfoldMTP`` and the config classes of draft directories; both are imported when used. On a
  CPU this patches two functions of speculative sampling (`cpu_sampling`) and the rejection sampler (`cpu_greedy`).
- A collector of the counts of drafts by source, empty unless a worker counts them (`common.mtp.metrics`).
- Patched: the busy loops of vLLM's processes (`busy_loop`), and how drafts reach the engine (`draft_messages`).

`register` is the entry point of ``vllm.general_plugins``: vLLM calls it in every process. It may be called again, never
raises, and logs one line: that it registered; one more where a feature is off, what is missing and how to fix it.
"""

from __future__ import annotations

import logging

_done: set[str] = set()


def register() -> bool:
    """Register with the vLLM of this process; returns whether all features are available."""
    log = logging.getLogger("vllm.fourfold")  # vLLM prints records below its own logger only
    failed: dict[str, str] = {}
    for feature, add in _FEATURES.items():
        try:
            from fourfold.common.settings import disabled

            if disabled():
                return False
            if feature not in _done:
                add(log)
                _done.add(feature)
        except Exception as error:  # vLLM ends the process when a plugin raises, also where nobody asked for fourfold
            failed[feature] = f"{type(error).__name__}: {error}"
    if failed:
        log.warning(
            "fourfold: %s: off, vLLM goes on without: %s. `fourfold doctor` shows which vLLM versions fit; "
            "FOURFOLD_DISABLE=1 silences this",
            *(", ".join(failed), "; ".join(dict.fromkeys(failed.values()))),
        )
    return not failed


def _quantisation(log: logging.Logger) -> None:
    from fourfold.vllm_ext.cpu_amx import allow
    from fourfold.vllm_ext.quant_config import FourfoldNvfp4Config

    allow()
    log.info("fourfold: registered --quantization %s", FourfoldNvfp4Config.get_name())


def _mtp(log: logging.Logger) -> None:
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry

    from fourfold.vllm_ext.cpu_sampling import repair
    from fourfold.vllm_ext.mtp_config import FourfoldMlaMtpConfig, FourfoldMtpConfig

    for config in (FourfoldMtpConfig, FourfoldMlaMtpConfig):
        AutoConfig.register(config.model_type, config)
    ModelRegistry.register_model("FourfoldMTP", "fourfold.vllm_ext.mtp_model:FourfoldMTP")
    repair()


def _metrics(log: logging.Logger) -> None:
    from fourfold.common.mtp.metrics import serve

    serve()


def _processes(log: logging.Logger) -> None:
    from fourfold.vllm_ext import busy_loop, draft_messages

    busy_loop.widen()
    draft_messages.attach()


_FEATURES = {"--quantization fourfold_nvfp4": _quantisation, "MTP heads": _mtp, "counts of drafts by source": _metrics}
_FEATURES["changes to vLLM's processes"] = _processes

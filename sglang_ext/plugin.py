"""What fourfold registers with SGLang: the quantisation method ``fourfold_nvfp4`` with its command-line choice, the
draft model class ``FourfoldMTP`` and the speculative algorithm ``FOURFOLD_MTP``.

`register` is the entry point of ``sglang.srt.plugins``: SGLang calls it in every process. It adds to the tables that
SGLang keeps for plugins (no patches of functions or classes, but with the setting ``mtp.adaptive_data_parallel``), may
be called again, never raises, and logs one line: that it registered, or what is missing and how to fix it.
"""

from __future__ import annotations

import logging
import sys

_done: set[str] = set()


def register() -> bool:
    """Register with the SGLang of this process; returns whether fourfold's methods are available."""
    log = logging.getLogger("fourfold")
    off = "fourfold is"
    try:
        from fourfold.common.settings import disabled

        if disabled():
            return False
        if "quantisation" not in _done:
            _quantisation()
            log.info("fourfold: registered --quantization fourfold_nvfp4")
            _done.add("quantisation")
        off = "fourfold's MTP heads are"
        if "algorithm" not in _done:
            from fourfold.sglang_ext import mtp_algorithm

            mtp_algorithm.register()
            _done.add("algorithm")
        # A process that has no model loader yet loads no models, and the registry would import all of SGLang's.
        if "MTP" not in _done and "sglang.srt.model_loader" in sys.modules:
            _mtp()
            _done.add("MTP")
        return True
    except Exception as error:
        log.warning(
            "%s off, SGLang goes on without it: %s: %s. `fourfold doctor` shows which SGLang versions fit; "
            "FOURFOLD_DISABLE=1 silences this",
            off,
            type(error).__name__,
            error,
        )
        return False


def _quantisation() -> None:
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers import linear, quantization

    from fourfold.sglang_ext.quant_config import FourfoldNvfp4Config

    name = FourfoldNvfp4Config.get_name()
    methods = quantization.QUANTIZATION_METHODS
    if name not in methods:
        # First: SGLang takes the first method that claims a checkpoint, and ours claims only what asks for it by name.
        others = dict(methods)
        methods.clear()
        methods.update({name: FourfoldNvfp4Config, **others})
    quantization.CPU_QUANTIZATION_METHODS[name] = FourfoldNvfp4Config
    if name not in choices.QUANTIZATION_CHOICES:
        choices.add_quantization_method_choices([name])
    if "FourfoldNvfp4LinearMethod" not in linear.WEIGHT_LOADER_V2_SUPPORTED:
        linear.WEIGHT_LOADER_V2_SUPPORTED.append("FourfoldNvfp4LinearMethod")


def _mtp() -> None:
    from sglang.srt.models.registry import ModelRegistry

    from fourfold.sglang_ext.mtp_model import FourfoldMTP

    ModelRegistry.models[FourfoldMTP.__name__] = FourfoldMTP

"""Which checkpoints are fourfold's to serve. Engines ask for every quantised model, so this imports no torch."""

from __future__ import annotations

from typing import Any

from fourfold.common.settings import METHOD


def claims(config: Any, asked: str | None) -> str | None:
    """Return `METHOD` where a checkpoint is fourfold's to serve: the flag asks for it, or its config names it.

    Another method's checkpoint without the flag is none of ours.

    Args:
        config: ``quantization_config`` of the model's ``config.json``.
        asked: the value of the engine's ``--quantization``.
    """
    named = isinstance(config, dict) and config.get("quant_method") == METHOD
    return METHOD if asked == METHOD or (named and asked is None) else None

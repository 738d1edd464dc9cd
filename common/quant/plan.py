"""The `LayerPlan` of a model that an engine loads: its quantisation config, the user's options, the statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.quant.importance import Importance, find_beside, load_importance
from fourfold.common.quant.layers import LayerPlan
from fourfold.common.quant.source import read_source
from fourfold.common.settings import QuantSettings

MODELOPT_FILE = "hf_quant_config.json"


def plan_for(
    model: str,
    config: Mapping[str, Any] | None,
    settings: QuantSettings,
    fused: Mapping[str, Sequence[str]] | None = None,
    rename: Callable[[list[str]], list[str]] | None = None,
) -> LayerPlan:
    """Return the plan.

    Args:
        model: directory or hub name, as given to the engine.
        config: ``quantization_config`` of the model's ``config.json``; ModelOpt may keep it in a file of its own.
        settings: the user's options.
        fused: the engine's map of fused module names.
        rename: turns names of the checkpoint's modules into the engine's.

    Raises:
        FourfoldError: the checkpoint's format is not served, or the statistics that the settings name are unusable.
    """
    beside = Path(model) / MODELOPT_FILE
    if not config and beside.is_file():
        try:
            config = json.loads(beside.read_text())
        except json.JSONDecodeError as error:
            raise FourfoldError(f"{beside} is not JSON: {error}") from None
    source = read_source(config)
    if rename is not None:
        source = replace(source, ignore=tuple(rename(list(source.ignore))))
    found: Importance | None = None
    origin = None
    if not source.is_nvfp4 and settings.importance != "none":
        path = find_beside(model) if settings.importance == "auto" else Path(settings.importance)
        if path is not None:
            loaded = load_importance(path)
            found, origin = loaded, f"{path.name} ({loaded.origin})"
    return LayerPlan(source, settings, fused or {}, found.mean_square if found else {}, origin)

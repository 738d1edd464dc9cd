"""What there is of a new model: ``config.json`` and, where they are beside it, quantisation and the index of weights.

Weights need not be there: an index alone names the tensors and their total size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.head import KEY
from fourfold.common.recipe.plain_yaml import read_bytes
from fourfold.common.recipe.sizing.traits import flat

INDEX = "model.safetensors.index.json"
MODELOPT = "hf_quant_config.json"
LARGEST_CONFIG = 8 << 20
LARGEST_INDEX = 256 << 20  # names of all tensors; a checkpoint with a thousand experts a layer has some 50 MiB


@dataclass(frozen=True)
class Found:
    """A model's files.

    Attributes:
        path: of ``config.json``.
        raw: the configuration for the card: as published, with the quantisation of ``hf_quant_config.json``.
        config: ``raw``, flat.
        quantised_apart: whether ``hf_quant_config.json`` said how the model is quantised.
        names: its tensors, empty where no index or file names them.
        bytes: size of the weights; None: not known.
        license: as the model's page says; None: it does not.
        template: whether a chat template is there; None: no tokenizer is there to tell.
    """

    path: Path
    raw: Mapping[str, Any]
    config: Mapping[str, Any]
    quantised_apart: bool
    names: tuple[str, ...]
    bytes: int | None
    license: str | None
    template: bool | None

    @property
    def architecture(self) -> str:
        """The class that the model names; empty where it names none."""
        named = self.raw.get("architectures")
        first = named[0] if isinstance(named, list) and named else ""
        return first if isinstance(first, str) and first.isidentifier() else ""


def read_model(path: Path) -> Found:
    """Read a model directory, or a ``config.json`` alone with what is beside it.

    Raises:
        FourfoldError: not there, not JSON, or an index that names no tensors.
    """
    config = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise FourfoldError(f"{path}: no such file or directory; expected a model directory or its config.json")
    raw = _object(config, LARGEST_CONFIG)
    folder = config.parent
    if KEY in raw:
        raise FourfoldError(f"{path}: a draft directory that fourfold wrote; expected the model that it drafts for")
    apart = None
    if not any(isinstance(part, dict) and part.get("quantization_config") for part in (raw, raw.get("text_config"))):
        apart = _modelopt(folder / MODELOPT)
    if apart:
        raw = {**raw, "quantization_config": apart}
    names, size = _weights(folder)
    return Found(config, raw, flat(raw), bool(apart), names, size, _license(folder), _template(folder))


def _object(path: Path, largest: int) -> dict[str, Any]:
    try:
        data = json.loads(read_bytes(path, largest))
    except (ValueError, RecursionError) as error:
        if isinstance(error, FourfoldError):
            raise
        raise FourfoldError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise FourfoldError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _modelopt(path: Path) -> dict[str, Any] | None:
    """The quantisation that ModelOpt wrote beside the config, in the words of a ``quantization_config``."""
    if not path.is_file():
        return None
    quant = _object(path, LARGEST_CONFIG).get("quantization")
    if not isinstance(quant, dict) or not quant.get("quant_algo"):
        return None
    out = {"quant_method": "modelopt", **quant}
    if isinstance(quant.get("exclude_modules"), list):
        out["ignore"] = out.pop("exclude_modules")
    if str(quant.get("kv_cache_quant_algo")).upper() == "FP8":
        out["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return out


def _weights(folder: Path) -> tuple[tuple[str, ...], int | None]:
    """Names of the tensors and their bytes, from the index; else from the safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    held = sum(path.stat().st_size for path in files) or None
    if (folder / INDEX).is_file():
        index = _object(folder / INDEX, LARGEST_INDEX)
        weights = index.get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise FourfoldError(f"{folder / INDEX}: weight_map: expected an object of tensor to file")
        whole = held if {path.name for path in files} >= set(map(str, weights.values())) else None
        metadata = index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        size = whole or (int(total) if isinstance(total, (int, float)) and total > 0 else None)
        return tuple(map(str, weights)), size
    from fourfold.common.tensor_index import read_header

    return tuple(name for path in files for name in read_header(path)), held


def _license(folder: Path) -> str | None:
    """``license:`` at the head of the model's page."""
    try:
        head = (folder / "README.md").read_text(errors="replace")[:4000]
    except OSError:
        return None
    found = re.search(r"^license(?:_name)?:[ \t]*([\w.+-]{2,60})[ \t]*$", head, re.MULTILINE)
    return found[1] if found else None


def _template(folder: Path) -> bool | None:
    path = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    if not path.is_file():
        return None
    return bool(_object(path, LARGEST_CONFIG).get("chat_template"))

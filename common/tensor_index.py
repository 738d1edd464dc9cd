"""Which tensors a model directory holds, read from the headers of its safetensors files and from nothing else.

Every defect of the files (index, shards, headers, sizes) is found here, before work starts. Imports no torch.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fourfold.common.errors import FourfoldError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64", "F32", "F16", "BF16"}
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: shard file name, safetensors dtype, shape."""

    shard: str
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FourfoldError: the file is missing, is not JSON or not an object.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise FourfoldError(f"{path} does not exist; a model directory has it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FourfoldError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise FourfoldError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


class TensorIndex:
    """The tensors of a model directory.

    Attributes:
        path: the directory.
        config: its ``config.json``.
        entries: tensor name to place, in the order of the shards.
        shards: shard file names in order.

    Raises:
        FourfoldError: no config, no safetensors, a shard that is missing, truncated or damaged, or an index that does
            not agree with its shards; the message names the file and the fix.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise FourfoldError(f"model {str(path)!r} is not a directory; give a directory with config.json")
        self.config = read_json(path / "config.json")
        self.entries: dict[str, Entry] = {}
        weight_map = self._weight_map()
        self.shards = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        for shard in self.shards:
            for name, entry in read_header(path / shard).items():
                if name in self.entries:
                    raise FourfoldError(f"{name} is in {self.entries[name].shard} and in {shard}; the index is damaged")
                if weight_map and weight_map.get(name) != shard:
                    continue  # engines load what the index names
                self.entries[name] = Entry(shard, *entry)
        lost = [name for name in weight_map or () if name not in self.entries]
        if lost:
            raise FourfoldError(f"{INDEX} lists {lost[0]} in {(weight_map or {})[lost[0]]}, which does not hold it")
        if not self.entries:
            raise FourfoldError(f"{path} holds no tensors")

    def _weight_map(self) -> dict[str, str] | None:
        if (self.path / INDEX).is_file():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise FourfoldError(f"{self.path / INDEX}: expected an object weight_map of tensor to file")
            for name, shard in weight_map.items():
                if not isinstance(shard, str) or Path(shard).name != shard:
                    raise FourfoldError(f"{self.path / INDEX}: {name}: {shard!r} is not the name of a file beside it")
            missing = sorted({s for s in set(weight_map.values()) if not (self.path / s).is_file()})
            if missing:
                raise FourfoldError(f"{self.path}: shards are missing: {', '.join(missing)}; download the model again")
            return weight_map
        if not (self.path / SINGLE).is_file():
            others = sorted(p.name for p in self.path.glob("*.safetensors"))
            found = f"found {', '.join(others[:3])} but no index" if others else "found no safetensors"
            raise FourfoldError(f"{self.path}: expected {SINGLE} or {INDEX}, {found}; convert the model to safetensors")
        return None


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of one file, checked against its size: name to (dtype, shape)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise FourfoldError(f"{path} is truncated ({size} bytes); download it again")
        try:
            header = json.loads(file.read(length))
            items = {name: item for name, item in header.items() if name != "__metadata__"}
            end = max((item["data_offsets"][1] for item in items.values()), default=0)
            found = {name: (str(item["dtype"]), tuple(item["shape"])) for name, item in items.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise FourfoldError(f"{path} is not a safetensors file: {error}") from None
    if 8 + length + end != size:
        state = "truncated" if 8 + length + end > size else "damaged"
        raise FourfoldError(f"{path} is {state}: {size} bytes, its header needs {8 + length + end}; download it again")
    try:
        with safe_open(path, "np"):
            return found
    except SafetensorError as error:
        raise FourfoldError(f"{path} is damaged: {error}; download it again") from None

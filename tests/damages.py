"""Ways to damage a model directory, for the tests of malformed checkpoints."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], Any]


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the JSON of file ``name``, in place or to what ``change`` returns."""

    def damage(path: Path) -> None:
        data = json.loads((path / name).read_text())
        result = change(data)
        (path / name).write_text(json.dumps(data if result is None else result))

    return damage


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Change the bytes of file ``name``."""
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def edit_header(shard: str, change: Callable[[dict[str, Any]], None]) -> Damage:
    """Change the header of a safetensors file, in place."""

    def edit(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return edit_bytes(shard, edit)


def edit_config(**values: Any) -> Damage:
    """Set keys of ``config.json``."""
    return edit_json("config.json", lambda config: config.update(values))

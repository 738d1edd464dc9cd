"""A CUDA machine for vLLM 0.33: the platform has kept the interface of 0.32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probe import load

_older: Any = load(Path(__file__).with_name("simulated_0_32.py"))
become, install, machine, stand_in = _older.become, _older.install, _older.machine, _older.stand_in

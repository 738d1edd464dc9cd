"""A CUDA machine for vLLM 0.33: the platform has kept the interface of 0.32."""

from __future__ import annotations

from typing import Any

from probe import load

_older: Any = load("simulated_vllm_0_32")
become, install = _older.become, _older.install

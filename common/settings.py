"""Every option of fourfold, in one typed object, and the only place that reads environment variables.

vLLM passes settings as ``--additional-config '{"fourfold": {...}}'``, SGLang through the environment variable
``FOURFOLD_CONFIG`` (the same JSON object, without the outer key). Unknown keys are refused with the nearest valid
name. Environment variables are parsed strictly and latched: the first value read holds for the process.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator

from fourfold.common.errors import FourfoldError
from fourfold.common.strict import Strict, problems

METHOD = "fourfold_nvfp4"  # the engines' name of the quantisation method
ALGORITHM = "FOURFOLD_MTP"  # SGLang's name of the speculative algorithm

ScaleMethod = Literal["sweep", "four_over_six", "absmax"]
SchemeName = Literal["auto", "w4a16", "w4a4"]
SCALE_METHODS: tuple[str, ...] = get_args(ScaleMethod)


class QuantSettings(Strict):
    """Options of ``--quantization fourfold_nvfp4``."""

    scales: ScaleMethod = Field(
        default="sweep", description="how block scales are chosen when weights are quantised while loading"
    )
    scheme: SchemeName = Field(
        default="auto",
        description="w4a16: NVFP4 weights; w4a4: activations too; auto: what the checkpoint declares, else w4a16",
    )
    importance: str = Field(
        default="auto",
        description="statistics file that weights the scale search; auto: one beside the model; none: unweighted",
    )
    ignore: list[str] = Field(
        default_factory=list, description="regular expressions; a layer whose name contains a match keeps its dtype"
    )
    backend: str = Field(default="auto", description="auto, cpu, cpu_int16 or reference")

    @field_validator("ignore")
    @classmethod
    def _regexes(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns

    def ignores(self, name: str) -> bool:
        """Whether the layer ``name`` matches one of `ignore`."""
        return any(re.search(pattern, name) for pattern in self.ignore)


class HybridSettings(Strict):
    """Options of hybrid drafting: drafts from a request's own text first, from its MTP head otherwise."""

    enabled: bool = Field(default=True, description="false: SGLang's FOURFOLD_MTP drafts with the head alone")
    min_match: int = Field(
        default=4, ge=1, description="tokens of the current suffix that must have occurred before, to draft from there"
    )
    max_draft: int = Field(default=16, ge=1, description="longest draft from the text, below the engine's own limit")
    draft_per_match: float = Field(
        default=1.0, gt=0, description="drafted tokens for each matched token: longer matches are likelier to go on"
    )
    head_tokens: int = Field(default=3, ge=1, description="tokens that the MTP head drafts where the text does not")
    learn_head: bool = Field(
        default=True,
        description="the head drafts fewer tokens, or none, where that is faster; false: always head_tokens",
    )


class MtpSettings(Strict):
    """Options of multi-token prediction."""

    hybrid: HybridSettings = Field(default_factory=HybridSettings)
    adaptive_data_parallel: bool = Field(
        default=False,
        description="data-parallel ranks agree on a learned draft length: vLLM's with AdaptiveScheduler, SGLang's with "
        "--speculative-adaptive",
    )


class Settings(Strict):
    """All options."""

    quant: QuantSettings = Field(default_factory=QuantSettings)
    mtp: MtpSettings = Field(default_factory=MtpSettings)


def parse_settings(data: Any, source: str) -> Settings:
    """Validate ``data`` as settings.

    Raises:
        FourfoldError: names ``source``, the key, the value found and what was expected.
    """
    if not isinstance(data, dict):
        raise FourfoldError(f"{source}: expected a JSON object of settings, got {type(data).__name__} {data!r}")
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise FourfoldError(f"{source}: {'; '.join(problems(error))}") from None


def additional_settings(additional_config: Any) -> Settings:
    """The settings in vLLM's ``--additional-config``, whose other keys are not ours.

    Raises:
        FourfoldError: see `parse_settings`.
    """
    options = additional_config.get("fourfold", {}) if isinstance(additional_config, dict) else {}
    return parse_settings(options, "--additional-config fourfold")


@cache
def disabled() -> bool:
    """Whether ``FOURFOLD_DISABLE`` turns fourfold off (``1`` or ``0``; latched)."""
    value = os.environ.get("FOURFOLD_DISABLE", "0")
    if value not in ("0", "1"):
        raise FourfoldError(f"FOURFOLD_DISABLE={value!r}: expected 1 (off) or 0 (on)")
    return value == "1"


@cache
def settings_from_env() -> Settings:
    """The settings in ``FOURFOLD_CONFIG`` (latched); defaults where it is unset.

    Raises:
        FourfoldError: not JSON, or not valid settings.
    """
    text = os.environ.get("FOURFOLD_CONFIG", "{}")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise FourfoldError(f"FOURFOLD_CONFIG is not JSON ({error}): {text!r}") from None
    return parse_settings(data, "FOURFOLD_CONFIG")


@cache
def cpu_isa() -> str | None:
    """The instruction set that ``FOURFOLD_CPU_ISA`` asks for (latched); None: the best there is."""
    return os.environ.get("FOURFOLD_CPU_ISA") or None


@cache
def sglang_platform() -> str | None:
    """The platform that ``SGLANG_PLATFORM`` names (latched)."""
    return os.environ.get("SGLANG_PLATFORM") or None


@cache
def api_key() -> str | None:
    """The key that ``FOURFOLD_API_KEY`` holds for servers that ask for one (latched)."""
    return os.environ.get("FOURFOLD_API_KEY") or None


def metrics_dir() -> str | None:
    """Where this process shall count: ``PROMETHEUS_MULTIPROC_DIR``, else ``FOURFOLD_METRICS_DIR``.

    Not latched: engines set the first while they start, fourfold sets the second for the processes started after.
    """
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ.get("FOURFOLD_METRICS_DIR") or None


@cache
def cxx() -> str | None:
    """The C++ compiler that ``CXX`` names (latched)."""
    return os.environ.get("CXX") or None


@cache
def cache_dir() -> Path:
    """Where compiled kernels and test models are kept: ``FOURFOLD_CACHE``, else the user's cache directory."""
    explicit = os.environ.get("FOURFOLD_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fourfold"

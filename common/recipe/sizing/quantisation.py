"""Which format a checkpoint stores each weight in, from ``quantization_config`` and the model card.

Reads the vocabularies of DeepSeek's FP8, ModelOpt, compressed-tensors, MXFP4 (gpt-oss), AWQ and GPTQ. A weight is asked
for by its usual names in checkpoints; ignore lists of any of these vocabularies are matched against them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.sizing.formats import block_fp8, format_named

# Where layer i's modules are, by family.
PREFIXES = (
    "model.layers.{i}.",
    "layers.{i}.",
    "model.language_model.layers.{i}.",
    "language_model.model.layers.{i}.",
    "language_model.layers.{i}.",
    "backbone.layers.{i}.",
)
MTP_PREFIXES = ("mtp.{i}.", "mtp.layers.{i}.", "model.mtp.layers.{i}.")
# Parts that a model card may name, and the parts of ours that each covers.
CARD_PARTS: dict[str, tuple[str, ...]] = {
    "all": ("experts", "attention", "shared", "dense", "router", "latent", "embeddings", "head", "mtp", "draft"),
    "dense": ("dense", "attention", "shared", "latent"),
    "linear": ("dense", "attention", "shared", "latent"),
    "rest": ("dense", "attention", "shared", "latent", "router", "embeddings", "head"),
    "other": ("dense", "attention", "shared", "latent", "router", "embeddings", "head"),
    "shared_experts": ("shared",),
    "mlp": ("dense",),
    "dense_mlp": ("dense",),
    "embedding": ("embeddings",),
    "emb": ("embeddings", "head"),
    "lm_head": ("head",),
    "gate": ("router",),
    "linear_attention": ("linear_attention",),
    "mamba": ("linear_attention",),
}
UNQUANTISED = frozenset({"router", "norms", "residual", "state_weights", "vision", "latent"})


class Formats:
    """Formats of a checkpoint's weights."""

    def __init__(
        self,
        config: Mapping[str, Any],
        card_formats: Mapping[str, str] | None = None,
        load: str | None = None,
        source: str = "model card",
    ) -> None:
        """
        Args:
            config: ``config.json``, nested text configurations already merged in.
            card_formats: part to format; decides where ``config`` says nothing of quantisation.
            load: format that 16-bit linear weights are quantised to while loading (``fourfold_nvfp4``).
        """
        self.base = format_named(str(config.get("dtype") or config.get("torch_dtype") or "bf16"), "config.json dtype")
        self.load = load
        quant = config.get("quantization_config") or config.get("compression_config")
        self.quant: dict[str, Any] = dict(quant) if isinstance(quant, Mapping) else {}
        self.expert = config.get("expert_dtype") or self.quant.get("expert_dtype")
        self.method = str(self.quant.get("quant_method") or self.quant.get("quant_algo") or "").lower()
        self.mixed = _mixed(self.quant.get("quantized_layers"))
        self.card: dict[str, str] = {}
        for name, text in sorted((card_formats or {}).items(), key=lambda item: item[0] != "all"):
            value = format_named(text, f"{source}: formats.{name}")
            for part in CARD_PARTS.get(name, (name,)):
                self.card[part] = value
        ignored = [*_texts(self.quant.get(k) for k in ("ignore", "ignored_layers", "exclude_modules"))]
        ignored += _texts([self.quant.get("modules_to_not_convert")])
        self.ignored = _matcher(tuple(ignored))

    @property
    def declared(self) -> bool:
        """Whether ``config.json`` itself says how weights are quantised."""
        return bool(self.quant)

    def of(self, part: str, layer: int, names: Sequence[str], mtp: int | None = None) -> str:
        """The format of one weight.

        Args:
            part: such as ``experts`` or ``attention``.
            layer: index of its layer; ``names`` are relative to it, or whole names where it is -1.
            mtp: number of the MTP module that it is in.
        """
        found = self._stored(part, layer, names, mtp)
        if self.load and found in ("bf16", "fp16", "fp32") and part in ("experts", "attention", "shared", "dense"):
            return self.load
        return found

    def _stored(self, part: str, layer: int, names: Sequence[str], mtp: int | None) -> str:
        if not self.quant:
            return self._from_card(part, mtp)
        if part in UNQUANTISED or part in ("embeddings", "head"):
            return self.base
        full = _full_names(tuple(names), layer, mtp)
        if self.mixed:
            algorithm = next((self.mixed[n] for n in full if n in self.mixed), None)
            if algorithm is not None:
                return _algorithm(algorithm)
            if self.method != "fp8":  # all that a mixed checkpoint does not list keeps its dtype
                return self.base
        if part == "experts" and self.expert:
            plain = self.ignored is None or not any(self.ignored(n) for n in full) or mtp is not None
            own = self.quant.get("moe_quant_algo")
            if own and mtp is None:
                return _algorithm(str(own))
            if plain:
                return "mxfp4" if str(self.expert) in ("fp4", "mxfp4") else self._linear()
        if self.method == "mxfp4" and part != "experts":
            return self.base
        # An NVFP4 copy of an FP8 checkpoint ignores what stays FP8, it does not make it 16-bit.
        kept_fp8 = self.method == "fp8" and self.quant.get("quant_algo") == "MIXED_PRECISION"
        if self.ignored is not None and not kept_fp8 and any(self.ignored(n) for n in full):
            return self.base
        return self._linear()

    def _linear(self) -> str:
        quant = self.quant
        algorithm = str(quant.get("quant_algo") or "")
        if self.method == "fp8" or self.method.startswith("deepseek"):
            return block_fp8(quant.get("weight_block_size"), quant.get("scale_fmt"))
        if self.method == "mxfp4":
            return "mxfp4"
        if algorithm and algorithm != "MIXED_PRECISION":
            return _algorithm(algorithm)
        if self.method in ("awq", "gptq", "awq_marlin", "gptq_marlin", "auto-round"):
            return "int8" if quant.get("bits") == 8 else "int4"
        groups = quant.get("config_groups")
        if isinstance(groups, Mapping) and groups:
            first = next(iter(groups.values()))
            return _group(first if isinstance(first, Mapping) else {}, str(quant.get("format") or ""))
        if self.method == "fourfold_nvfp4":
            return "nvfp4"
        return self.base

    def _from_card(self, part: str, mtp: int | None) -> str:
        for key in ("mtp", part) if mtp is not None else (part,):
            if key in self.card:
                return self.base if part in UNQUANTISED and part not in self.card else self.card[key]
        if part == "linear_attention" and "attention" in self.card:
            return self.card["attention"]
        return self.base


def _algorithm(name: str) -> str:
    known = {"NVFP4": "nvfp4", "W4A4_NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4", "W4A8_NVFP4_FP8": "nvfp4", "FP8": "fp8"}
    known |= {"FP8_PB_WO": "fp8_block128", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "MXFP8": "mxfp8", "MXFP4": "mxfp4"}
    known |= {"W4A16_AWQ": "int4", "W4A8_AWQ": "int4", "W8A16": "int8"}
    upper = name.upper()
    return known.get(upper) or format_named(name, "quantization_config quant_algo")


def _group(group: Mapping[str, Any], fallback: str) -> str:
    """The format of a compressed-tensors group of layers."""
    weights = group.get("weights")
    weights = weights if isinstance(weights, Mapping) else {}
    kind = str(group.get("format") or fallback)
    if "mxfp4" in kind:
        return "mxfp4"
    if "nvfp4" in kind:
        return "nvfp4"
    bits, type_ = weights.get("num_bits"), weights.get("type")
    if type_ == "float" and bits == 4:
        return "mxfp4" if weights.get("group_size") == 32 else "nvfp4"
    if type_ == "float" and bits == 8:
        if weights.get("group_size") == 32:
            return "mxfp8"
        return "fp8_block128" if weights.get("strategy") == "block" else "fp8"
    return "int4" if bits == 4 else "int8"


def _mixed(layers: object) -> dict[str, str]:
    """Every dotted prefix of a listed module to its algorithm."""
    out: dict[str, str] = {}
    if isinstance(layers, Mapping):
        for name, value in layers.items():
            algorithm = str(value.get("quant_algo") if isinstance(value, Mapping) else value)
            steps = name.split(".")
            for end in range(len(steps), 3, -1):
                out.setdefault(".".join(steps[:end]), algorithm)
            out[name] = algorithm
    return out


def _texts(values: Iterable[object]) -> list[str]:
    return [str(item) for value in values if isinstance(value, list) for item in value]


def _matcher(patterns: tuple[str, ...]):
    """A function from a name to whether an ignore list has it; None: nothing is ignored."""
    if not patterns:
        return None
    parts = []
    for pattern in patterns:
        if pattern.startswith("re:"):
            parts.append(f"(?:{pattern[3:]})")
        elif "*" in pattern:
            parts.append(fnmatch.translate(pattern))
        else:  # a module, or all modules below it, or a module's short name
            parts.append(rf"(?:.*\.)?{re.escape(pattern)}(?:\..*)?\Z")
    try:
        compiled = [re.compile(part) for part in parts]
    except re.error as error:
        raise FourfoldError(
            f"config.json: quantization_config: {error.pattern!r} is no regular expression: {error}"
        ) from None

    @cache
    def ignored(name: str) -> bool:
        return any(p.match(name) for p in compiled)

    return ignored


@lru_cache(maxsize=65536)
def _full_names(names: tuple[str, ...], layer: int, mtp: int | None) -> tuple[str, ...]:
    if layer < 0:
        return names
    out = [prefix.format(i=layer) + name for prefix in PREFIXES for name in names]
    if mtp is not None:
        out += [prefix.format(i=mtp) + name for prefix in MTP_PREFIXES for name in names]
    return tuple(out)

"""What a model is made of, read from ``config.json`` by traits and not by its name.

A layer has a mixer (``mla``, ``v4``, ``gqa``, ``gdn``, ``kda``, ``mamba2`` or none) and a feed-forward part (``moe``,
``dense`` or none). Traits that decide sizes and are not known are named in `Traits.unknown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold.common.errors import FourfoldError
from fourfold.common.recipe import loading

MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Layer:
    """One layer: the kinds of its two parts, and what its attention keeps.

    Attributes:
        ratio: tokens that one entry of a compressed cache stands for; 0: no compressed cache.
        window: tokens that a sliding window keeps; 0: all.
        indexer: whether it selects tokens with an indexer of its own.
        caches: whether it writes a cache of its own (V4.1's other layers read one below).
    """

    mixer: str
    ffn: str
    ratio: int = 0
    window: int = 0
    indexer: bool = False
    caches: bool = True


@dataclass(frozen=True)
class Traits:
    """A model's sizes. ``config`` is flat: nested text configurations are merged in."""

    config: Mapping[str, Any]
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    heads: int
    head_dim: int
    kv_heads: int
    experts: int = 0
    top_k: int = 0
    expert_inter: int = 0
    expert_hidden: int = 0  # differs from hidden where experts work in a latent space
    shared_inter: int = 0
    dense_inter: int = 0
    gated: bool = True
    streams: int = 1  # residual streams (hyper-connections)
    draft_layers: int = 0
    draft_experts: int = 0
    dspark: bool = False
    max_length: int = 0
    unknown: tuple[str, ...] = ()
    vision: Mapping[str, Any] = field(default_factory=dict)
    source: str = "config.json"

    def get(self, name: str, default: Any = 0) -> Any:
        """A value of the configuration; ``default`` where it is absent or null."""
        value = self.config.get(name)
        return default if value is None else value

    def number(self, name: str, default: int = 0) -> int:
        """A whole number of the configuration.

        Raises:
            FourfoldError: it is something else.
        """
        return _whole(self.get(name, default), name, self.source)

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers; empty where it is absent.

        Raises:
            FourfoldError: it is something else.
        """
        value = self.get(name, [])
        if not isinstance(value, list):
            raise FourfoldError(f"{self.source}: {name}: {value!r}; expected a list of whole numbers")
        return [_whole(item, name, self.source) for item in value]

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A part of the configuration; empty where it is absent.

        Raises:
            FourfoldError: it is not a mapping, or holds what should be a whole number and is not.
        """
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise FourfoldError(f"{self.source}: {name}: {value!r}; expected a mapping")
        for key, inner in value.items():
            if key.endswith(("_dim", "_heads", "_size")):
                _whole(inner, f"{name}.{key}", self.source)
        return value

    @property
    def matrices(self) -> int:
        """Weight matrices of a feed-forward part."""
        return 3 if self.gated else 2

    def count(self, mixer: str) -> int:
        return sum(layer.mixer == mixer for layer in self.layers)


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json``, flat.

    Raises:
        FourfoldError: not readable or not a JSON object.
    """
    return flat(loading.read_config(path))


def flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with its text model's keys on top."""
    out = dict(data)
    for name in ("text_config", "llm_config", "language_config"):
        inner = out.pop(name, None)
        if isinstance(inner, Mapping):
            out |= {key: value for key, value in inner.items() if value is not None or key not in out}
    return out


def read_traits(config: Mapping[str, Any], source: str = "config.json") -> Traits:
    """The traits of a flat configuration.

    Raises:
        FourfoldError: a size that every model has is missing or not a number.
    """
    reader = _Reader(config, source)
    hidden = reader.need("hidden_size")
    kinds = config.get("layers_block_type") or config.get("hybrid_override_pattern")
    count = len(kinds) if isinstance(kinds, (list, str)) and kinds else reader.need("num_hidden_layers", "n_layer")
    heads = reader.need("num_attention_heads")
    kv_heads = reader.maybe("num_key_value_heads", "num_kv_heads") or heads
    head_dim = reader.maybe("head_dim") or hidden // heads
    experts = reader.maybe("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    inter = reader.maybe("intermediate_size", "ffn_hidden_size")
    expert_inter = reader.maybe("moe_intermediate_size", "expert_intermediate_size") or (inter if experts else 0)
    shared = reader.maybe("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size")
    if not shared:
        number = reader.maybe("n_shared_experts", "num_shared_experts")
        shared = number * (reader.maybe("shared_intermediate_size") or expert_inter)
    dspark = any(key.startswith("dspark_") for key in config)
    drafts = reader.maybe("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "n_mtp_layers")
    if dspark:  # vLLM's models/deepseek_v4/nvidia/dspark.py: three stages where the config does not say
        drafts = reader.maybe("n_mtp_layers") or (drafts if drafts > 1 else 3)
    unknown: list[str] = []
    if count > MOST_LAYERS:
        raise FourfoldError(f"{source}: {count} layers; expected at most {MOST_LAYERS}")
    try:
        layers = _layers(reader, count, bool(experts), unknown)
    except FourfoldError:
        raise
    except (IndexError, TypeError, ValueError, AttributeError) as error:
        raise FourfoldError(
            f"{source}: what it says of single layers does not agree with {count} layers, or is no list: {error}"
        ) from None
    if not experts and any(layer.ffn == "moe" for layer in layers):
        raise FourfoldError(f"{source}: n_routed_experts: missing, and some layers are mixtures of experts")
    return Traits(
        config=config,
        hidden=hidden,
        vocab=reader.need("vocab_size"),
        layers=tuple(layers),
        heads=heads,
        head_dim=head_dim,
        kv_heads=kv_heads,
        experts=experts,
        top_k=reader.maybe("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k"),
        expert_inter=expert_inter,
        expert_hidden=reader.maybe("routed_expert_hidden_size", "moe_latent_size") or hidden,
        shared_inter=shared if experts else 0,
        dense_inter=reader.maybe("dense_intermediate_size") or inter,
        gated=str(config.get("mlp_hidden_act") or config.get("hidden_act")) not in ("relu2", "relu", "gelu_new"),
        streams=reader.maybe("hc_mult") or 1,
        draft_layers=drafts,
        draft_experts=reader.maybe("dspark_n_routed_experts") or experts,
        dspark=dspark,
        max_length=reader.maybe("max_position_embeddings", "max_sequence_length"),
        unknown=tuple(dict.fromkeys(unknown)),
        vision=vision if isinstance(vision := config.get("vision_config"), Mapping) else {},
        source=source,
    )


def _whole(value: Any, name: str, source: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FourfoldError(f"{source}: {name}: {value!r}; expected a whole number from 0")
    return value


class _Reader:
    """Whole numbers of a configuration."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source

    def maybe(self, *names: str) -> int:
        """The first that is there, else 0."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            return _whole(value, name, self.source)
        return 0

    def need(self, *names: str) -> int:
        found = self.maybe(*names)
        if not found:
            raise FourfoldError(f"{self.source}: {names[0]}: missing; a size cannot be computed without it")
        return found


def _layers(reader: _Reader, count: int, moe: bool, unknown: list[str]) -> list[Layer]:
    config = reader.config
    kinds = config.get("layers_block_type") or config.get("hybrid_override_pattern")
    if kinds and ("mamba_num_heads" in config or isinstance(kinds, str)):
        return [_nemotron(str(kind), unknown) for kind in kinds]
    ratios, types = config.get("compress_ratios"), config.get("layer_types")
    sources, indexers = config.get("kv_source_layer_ids"), config.get("index_source_layer_ids")
    types_index = config.get("indexer_types")
    sparse = (config.get("sparse_attention_config") or {}).get("sparse_attention_freq")
    linear = config.get("linear_attn_config") or {}
    kda = {int(i) - 1 for i in linear.get("kda_layers") or []}
    window = reader.maybe("sliding_window")
    out = []
    for i in range(count):
        ffn = "moe" if moe and _is_moe(config, i) else "dense"
        kind = types[i] if isinstance(types, list) and i < len(types) else ""
        if isinstance(ratios, list):
            ratio = int(ratios[i]) if i < len(ratios) else 0
            caches = not isinstance(sources, list) or i in sources
            indexer = i in indexers if isinstance(indexers, list) else ratio == 4
            out.append(Layer("v4", ffn, ratio, window, indexer and ratio > 0, caches))
        elif i in kda:
            out.append(Layer("kda", ffn))
        elif kind == "linear_attention":
            out.append(Layer("gdn" if "linear_num_value_heads" in config else "kda", ffn))
        elif reader.maybe("kv_lora_rank"):
            own = not isinstance(types_index, list) or types_index[i] == "full"
            out.append(Layer("mla", ffn, indexer=bool(reader.maybe("index_topk")) and own))
        else:
            known = ("", "full_attention", "sliding_attention", "attention", "chunked_attention")
            if kind not in known:
                unknown.append(f"layer_types: {kind}, sized as full attention")
            local = window if kind in ("sliding_attention", "chunked_attention") else 0
            out.append(Layer("gqa", ffn, window=local, indexer=bool(sparse and sparse[i])))
    return out


def _nemotron(kind: str, unknown: list[str]) -> Layer:
    known = {"mamba": ("mamba2", ""), "M": ("mamba2", ""), "moe": ("", "moe"), "E": ("", "moe")}
    known |= {"attention": ("gqa", ""), "*": ("gqa", ""), "mlp": ("", "dense"), "-": ("", "dense")}
    if kind not in known:
        unknown.append(f"layers_block_type: {kind}, not sized")
    return Layer(*known.get(kind, ("", "")))


def _is_moe(config: Mapping[str, Any], i: int) -> bool:
    kinds, frequency = config.get("mlp_layer_types"), config.get("moe_layer_freq")
    if isinstance(kinds, list) and i < len(kinds):
        return kinds[i] == "sparse"
    if isinstance(frequency, list) and i < len(frequency):
        return bool(frequency[i])
    if i < int(config.get("first_k_dense_replace") or 0) or i in (config.get("mlp_only_layers") or []):
        return False
    step = config.get("decoder_sparse_step") or (frequency if isinstance(frequency, int) else 1) or 1
    return (i + 1) % int(step) == 0 if config.get("decoder_sparse_step") else i % int(step) == 0

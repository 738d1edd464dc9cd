"""Which small model stands for a model, by what its ``config.json`` says, and what of the model it does not have.

Three shapes run on a processor in both engines: a dense Llama, grouped-query attention with experts (GLM-4-MoE) and
multi-head latent attention with experts (DeepSeek-V3). A model of another architecture is stood for by the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["llama", "glm4_moe", "deepseek_v3"]
ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
MTP = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers", "mtp_num_layers")
# Keys of a config.json, or beginnings of them, and what no replica has of it.
UNLIKE: dict[str, str] = {
    "index_topk": "sparse attention with an indexer",
    "index_n_heads": "sparse attention with an indexer",
    "compress_ratios": "attention over compressed keys and values",
    "num_hash_layers": "routing by a table of token ids",
    "hc_mult": "hyper-connections between layers",
    "linear_": "layers of linear attention",
    "kda_": "layers of linear attention",
    "layer_types": "layers of different kinds of attention",
    "full_attention_interval": "layers of different kinds of attention",
    "mamba_": "state-space layers",
    "ssm_": "state-space layers",
    "hybrid_override_pattern": "layers of different kinds",
    "sliding_window": "attention within a window",
    "dspark_": "drafts of DSpark",
    "engram": "Engram layers",
    "vision_config": "the vision tower",
    "moe_latent_size": "experts on a smaller latent state",
    "attention_sink": "attention sinks",
}


@dataclass(frozen=True)
class Traits:
    """What a replica takes from a config.

    Attributes:
        architecture: of the model; ``exact``: the replica is of the same.
        dense: layers without experts before those with them; 0: none.
        ratio: query heads for each head of keys and values.
        top_k: experts of a token.
        shared: experts that all tokens share.
        mtp: MTP modules of the checkpoint.
        missing: what the model has and the replica has not.
    """

    family: Family
    architecture: str
    exact: bool
    dense: int
    ratio: int
    top_k: int
    shared: int
    mtp: int
    missing: tuple[str, ...]


def read_traits(config: dict[str, Any]) -> Traits:
    """The traits of a ``config.json``; of a multimodal one those of its text model."""
    text = {**config, **config.get("text_config", {})}
    names = text.get("architectures") or config.get("architectures") or []
    architecture = str(names[0]) if names else str(text.get("model_type", "unknown"))
    experts = _first(text, EXPERTS)
    family: Family = "llama"
    if experts:
        latent = text.get("kv_lora_rank") or text.get("q_lora_rank") or text.get("o_lora_rank")
        family = "deepseek_v3" if latent else "glm4_moe"
    heads = int(text.get("num_attention_heads") or 1)
    exact = architecture == ARCHITECTURES[family]
    missing = {what for key, what in UNLIKE.items() for given in text if given.startswith(key) and text[given]}
    if "sliding_window" in text and not text.get("use_sliding_window", True):
        missing.discard(UNLIKE["sliding_window"])
    quantised = text.get("quantization_config") or config.get("quantization_config")
    if quantised:
        missing.add(f"weights in the checkpoint's format ({_format(quantised)})")
    return Traits(
        family,
        architecture,
        exact,
        dense=min(int(text.get("first_k_dense_replace") or 0), 1),
        ratio=max(1, heads // int(text.get("num_key_value_heads") or heads)),
        top_k=int(_first(text, PER_TOKEN) or 1),
        shared=int(text.get("n_shared_experts") or 0),
        mtp=int(_first(text, MTP) or 0),
        missing=tuple(sorted(missing)),
    )


def _first(text: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((text[key] for key in keys if text.get(key)), None)


def _format(quantised: dict[str, Any]) -> str:
    found = [quantised.get(key) for key in ("quant_method", "quant_algo", "moe_quant_algo", "fmt")]
    return ", ".join(str(value) for value in found if value) or "unknown"

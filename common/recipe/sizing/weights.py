"""Every weight of a model: parameters, format, and how ranks share it.

Shapes are those that vLLM 0.32 builds (``models/deepseek_v4``, ``models/kimi_k3``, ``mamba_mixer2`` and others). A
`Weight` is one matrix, or several of one kind, of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fourfold.common.recipe.sizing.formats import BYTES
from fourfold.common.recipe.sizing.quantisation import Formats
from fourfold.common.recipe.sizing.traits import Layer, Traits

LINEAR_MIXERS = ("gdn", "kda", "mamba2")


@dataclass(frozen=True)
class Weight:
    """Attributes:
    part: what it is shown under.
    shard: ``heads`` or ``width``: split over tensor ranks; ``kv``: at most by key-value heads; ``experts``: over expert
        ranks; ``vocab``: over tensor ranks, by rows; ``table``: the same, and over data ranks where the engine does;
        ``all``: on every rank.
    layer: -1: not of a layer.
    active: share of it that computes for one token.
    """

    part: str
    name: str
    parameters: int
    format: str
    shard: str
    layer: int = -1
    active: float = 1.0

    @property
    def bytes(self) -> float:
        return self.parameters * BYTES[self.format]


def weights(traits: Traits, formats: Formats, draft: bool = True, vision: bool = True) -> list[Weight]:
    """All weights; ``draft``: with the MTP or DSpark layers of the checkpoint; ``vision``: with its encoder."""
    out = list(_ends(traits, formats))
    for i, layer in enumerate(traits.layers):
        out += _layer(traits, formats, layer, i)
    if draft:
        for j in range(traits.draft_layers):
            out += _draft(traits, formats, j)
    if vision and traits.vision:
        out += _vision(traits, formats)
    return out


class _Build:
    """Collects the weights of one layer."""

    def __init__(self, traits: Traits, formats: Formats, layer: int, mtp: int | None = None) -> None:
        self.traits, self.formats, self.layer, self.mtp = traits, formats, layer, mtp
        self.out: list[Weight] = []

    def add(
        self, part: str, names: str, parameters: int, shard: str, active: float = 1.0, format: str | None = None
    ) -> None:
        if parameters <= 0:
            return
        listed = names.split()
        found = format or self.formats.of(part, self.layer, listed, self.mtp)
        shown = "attention" if part == "linear_attention" else part
        if self.mtp is not None:
            shown = "DSpark draft" if self.traits.dspark else "MTP"
        name = f"{listed[0]} (experts)" if part == "experts" and self.mtp is not None else listed[0]
        self.out.append(Weight(shown, name, parameters, found, shard, self.layer, active))


def _ends(traits: Traits, formats: Formats) -> Iterator[Weight]:
    size = traits.vocab * traits.hidden
    names = ("model.embed_tokens", "embed_tokens", "embed", "backbone.embeddings")
    yield Weight("embeddings", "embed_tokens", size, formats.of("embeddings", -1, names), "vocab", active=0.0)
    if not traits.get("tie_word_embeddings", False):
        yield Weight("head", "lm_head", size, formats.of("head", -1, ("lm_head", "head")), "vocab")
    for layer, rows in zip(traits.numbers("engram_layer_ids"), traits.numbers("engram_num_embeddings"), strict=False):
        width = traits.number("engram_head_dim")
        stored = formats.card.get("engram", "mxfp8")
        yield Weight("Engram", f"table of layer {layer}", rows * width, stored, "table", layer, active=0.0)


def _layer(traits: Traits, formats: Formats, layer: Layer, index: int) -> list[Weight]:
    build = _Build(traits, formats, index)
    _mixer(build, layer)
    _ffn(build, layer, traits.experts)
    _residual(build, layer)
    return build.out


def _draft(traits: Traits, formats: Formats, number: int) -> list[Weight]:
    """One MTP module, or one stage of DSpark: a layer as the target's last one, and a projection of two hiddens."""
    build = _Build(traits, formats, len(traits.layers) + number, number)
    h, last = traits.hidden, traits.layers[-1]
    if last.mixer in LINEAR_MIXERS or not last.mixer:  # MTP modules have full attention
        last = next((x for x in reversed(traits.layers) if x.mixer and x.mixer not in LINEAR_MIXERS), last)
    plain = "v4" if last.mixer == "v4" else last.mixer
    kind = Layer(plain, "moe" if traits.experts else "dense", 0, last.window, last.indexer and plain != "v4")
    _mixer(build, kind)
    _ffn(build, kind, traits.draft_experts)
    _residual(build, kind)
    sources = len(traits.numbers("dspark_target_layer_ids")) or 2
    if not traits.dspark or number == 0:
        build.add("dense", "eh_proj e_proj fc", sources * h * h, "all")
    if traits.dspark and number == 0:
        rank = traits.number("dspark_markov_rank")
        build.add("residual", "markov_head", 2 * traits.vocab * rank, "all")
    return build.out


def _residual(build: _Build, layer: Layer) -> None:
    t = build.traits
    parts = bool(layer.mixer) + bool(layer.ffn)
    build.add("norms", "norms", parts * t.hidden, "all", format="bf16")
    if t.streams > 1:  # hyper-connections: a float32 projection of all streams before attention and before the experts
        build.add("residual", "hc", parts * (2 + t.streams) * t.streams * t.streams * t.hidden, "all", format="fp32")


def _ffn(build: _Build, layer: Layer, experts: int) -> None:
    t, h = build.traits, build.traits.hidden
    if layer.ffn == "dense":
        names = "mlp.gate_proj mlp.up_proj mlp.down_proj ffn.w1 mixer.up_proj feed_forward.w1"
        build.add("dense", names, t.matrices * h * t.dense_inter, "width")
    if layer.ffn != "moe":
        return
    width = t.matrices * t.expert_hidden * t.expert_inter
    names = (
        "mlp.experts mlp.experts.0.gate_proj ffn.experts ffn.experts.0.w1 mixer.experts.0.up_proj mixer.experts"
        " block_sparse_moe.experts.0.w1 block_sparse_moe.experts.0.gate_proj block_sparse_moe.experts"
    )
    chosen = (t.number("dspark_num_experts_per_tok") if build.mtp is not None else 0) or t.top_k
    build.add("experts", names, experts * width, "experts", min(1.0, chosen / experts))
    build.add("router", "mlp.gate ffn.gate mixer.gate block_sparse_moe.gate mlp.router", experts * h, "all")
    if t.expert_hidden != h:
        names = "mixer.fc1_latent_proj mlp.latent_down block_sparse_moe.routed_expert_down_proj"
        build.add("latent", names, 2 * h * t.expert_hidden, "all")
    names = (
        "mlp.shared_experts.up_proj mlp.shared_expert.up_proj ffn.shared_experts.w1 mixer.shared_experts.up_proj"
        " block_sparse_moe.shared_experts.up_proj"
    )
    build.add("shared", names, t.matrices * h * t.shared_inter, "width")


def _mixer(build: _Build, layer: Layer) -> None:
    if layer.mixer:
        {"mla": _mla, "v4": _v4, "gqa": _gqa, "gdn": _gdn, "kda": _kda, "mamba2": _mamba2}[layer.mixer](build, layer)


def _mla(build: _Build, layer: Layer) -> None:
    t, h = build.traits, build.traits.hidden
    query, latent, rope = t.number("q_lora_rank"), t.number("kv_lora_rank"), t.number("qk_rope_head_dim")
    nope, value = t.number("qk_nope_head_dim", 128), t.number("v_head_dim", 128)
    width = t.heads * (nope + rope)
    build.add("attention", "self_attn.q_a_proj", h * query, "all")
    build.add("attention", "self_attn.q_b_proj self_attn.q_proj", (query or h) * width, "heads")
    build.add("attention", "self_attn.kv_a_proj_with_mqa", h * (latent + rope), "all")
    build.add("attention", "self_attn.kv_b_proj", latent * t.heads * (nope + value), "heads")
    build.add("attention", "self_attn.o_proj", t.heads * value * h, "heads")
    if t.get("mla_use_output_gate", False):
        build.add("attention", "self_attn.g_proj", h * t.heads * value, "heads")
    if layer.indexer:
        _indexer(build, "self_attn.indexer", query or h)


def _indexer(build: _Build, where: str, query: int, key: bool = True) -> None:
    """DeepSeek's sparse attention: every rank scores with all indexer heads."""
    t = build.traits
    count, dim = t.number("index_n_heads"), t.number("index_head_dim")
    build.add("attention", f"{where}.wq_b", query * count * dim, "all")
    if key:
        build.add("attention", f"{where}.wk", t.hidden * dim, "all")
    build.add("router", f"{where}.weights_proj", t.hidden * count, "all")


def _v4(build: _Build, layer: Layer) -> None:
    t, h = build.traits, build.traits.hidden
    query, out, dim = t.number("q_lora_rank"), t.number("o_lora_rank"), t.head_dim
    groups = t.number("o_groups", 1)
    build.add("attention", "attn.wq_a", h * query, "all")
    build.add("attention", "attn.wkv", h * dim, "all")
    build.add("attention", "attn.wq_b", query * t.heads * dim, "heads")
    build.add("attention", "attn.wo_a", t.heads * dim * out, "heads")
    build.add("attention", "attn.wo_b", groups * out * h, "heads")
    if not layer.ratio:
        return
    overlap = 2 if layer.ratio == 4 else 1
    gate = 2 if layer.ratio > 1 else 1
    if layer.caches:
        build.add("attention", "attn.compressor", h * gate * overlap * dim, "all", format="bf16")
    if layer.indexer:
        _indexer(build, "attn.indexer", query, key=False)
        small = t.number("index_head_dim")
        key = h * 2 * overlap * small if layer.ratio == 4 else dim * small
        build.add("attention", "attn.indexer.compressor", key, "all", format="bf16")


def _gqa(build: _Build, layer: Layer) -> None:
    t, h = build.traits, build.traits.hidden
    gate = 2 if t.get("attn_output_gate", False) else 1
    build.add("attention", "self_attn.q_proj mixer.q_proj", h * t.heads * t.head_dim * gate, "heads")
    build.add("attention", "self_attn.k_proj mixer.k_proj", 2 * h * t.kv_heads * t.head_dim, "kv")
    build.add("attention", "self_attn.o_proj mixer.o_proj", t.heads * t.head_dim * h, "heads")
    if layer.indexer:
        sparse = t.mapping("sparse_attention_config")
        dim, count = int(sparse.get("sparse_index_dim", 0)), int(sparse.get("sparse_num_index_heads", 0))
        build.add("attention", "self_attn.index_q_proj", h * (count + 1) * dim, "all")


def _gdn(build: _Build, layer: Layer) -> None:
    t, h = build.traits, build.traits.hidden
    keys = t.number("linear_num_key_heads") * t.number("linear_key_head_dim")
    heads = t.number("linear_num_value_heads")
    values = heads * t.number("linear_value_head_dim")
    width = 2 * keys + 2 * values
    build.add("linear_attention", "linear_attn.in_proj_qkvz linear_attn.in_proj_qkv", h * width, "heads")
    build.add("router", "linear_attn.in_proj_ba", h * 2 * heads, "heads")
    build.add("linear_attention", "linear_attn.out_proj", values * h, "heads")
    kernel = t.number("linear_conv_kernel_dim", 4)
    build.add("state_weights", "linear_attn.conv1d", (2 * keys + values) * kernel, "heads", format="bf16")


def _kda(build: _Build, layer: Layer) -> None:
    t, h = build.traits, build.traits.hidden
    linear = t.mapping("linear_attn_config")
    heads = int(linear.get("num_heads") or t.get("linear_num_heads", t.heads))
    dim = int(linear.get("head_dim") or t.get("linear_head_dim", 128))
    width = heads * dim
    build.add("linear_attention", "self_attn.q_proj", 3 * h * width, "heads")
    if linear.get("use_full_rank_gate"):
        build.add("linear_attention", "self_attn.g_proj", h * width, "heads")
    else:
        build.add("linear_attention", "self_attn.g_a_proj", h * dim + dim * width, "heads")
    build.add("linear_attention", "self_attn.f_a_proj", h * dim, "all")
    build.add("linear_attention", "self_attn.f_b_proj", dim * width, "heads")
    build.add("router", "self_attn.b_proj", h * heads, "heads")
    build.add("linear_attention", "self_attn.o_proj", width * h, "heads")
    kernel = int(linear.get("short_conv_kernel_size") or 4)
    build.add("state_weights", "self_attn.conv1d", 3 * width * kernel, "heads", format="fp32")


def _mamba2(build: _Build, layer: Layer) -> None:
    t, h = build.traits, build.traits.hidden
    heads = t.number("mamba_num_heads")
    inner = heads * t.number("mamba_head_dim", 64)
    groups = t.number("n_groups", 1) * t.number("ssm_state_size", 128)
    build.add("linear_attention", "mixer.in_proj", h * (2 * inner + 2 * groups + heads), "heads")
    build.add("linear_attention", "mixer.out_proj", inner * h, "heads")
    kernel = t.number("conv_kernel", 4)
    build.add("state_weights", "mixer.conv1d", (inner + 2 * groups) * kernel, "heads", format="bf16")


def _vision(traits: Traits, formats: Formats) -> list[Weight]:
    """The image encoder, as a plain transformer of its sizes."""
    v = traits.vision
    hidden = int(v.get("hidden_size") or v.get("vt_hidden_size") or 0)
    depth = int(v.get("num_hidden_layers") or v.get("depth") or v.get("vt_num_hidden_layers") or 0)
    inter = int(v.get("intermediate_size") or v.get("vt_intermediate_size") or 4 * hidden)
    size = depth * (4 * hidden * hidden + 2 * hidden * inter) + 8 * hidden * traits.hidden
    return [Weight("vision encoder", "vision", size, formats.base, "all")] if hidden and depth else []

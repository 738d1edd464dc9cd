"""The reference head against transformers' own MTP on one checkpoint, and each choice of a formula by its meaning."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM, LlamaConfig
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.head import Formula, Module, MtpHead
from fourfold.common.mtp.reader import read_head
from fourfold.common.mtp.reference import Block, Depth, ReferenceHead
from fourfold.common.mtp.verify import verify_greedy

HIDDEN, WORDS, LAYERS = 64, 96, 2
SHARED = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
MLA = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
MLA |= {"num_key_value_heads": 4}
TARGETS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM, MLA),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM, {"num_key_value_heads": 2, "head_dim": 16, "use_qk_norm": True}),
}


def causal(layer: nn.Module, rotary: nn.Module) -> Block:
    """A decoder layer of transformers as the reference calls it."""

    def block(hidden: Tensor, positions: Tensor) -> Tensor:
        size = len(positions)
        mask = torch.full((1, 1, size, size), float("-inf")).triu(1)
        where = positions[None]
        return layer(hidden, attention_mask=mask, position_ids=where, position_embeddings=rotary(hidden, where))

    return block


@dataclass
class Pair:
    """One checkpoint, as transformers and as fourfold run it."""

    target: Any
    theirs: MtpModel
    ours: ReferenceHead
    tokens: Tensor
    hidden: Tensor


@pytest.fixture(scope="module", params=[(name, n) for name in TARGETS for n in (1, 2)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, modules = request.param
    path: Path = tmp_path_factory.mktemp(name)
    config_class, model_class, special = TARGETS[name]
    torch.manual_seed(0)
    # The layers after the target's become the decoder layers of the head.
    config = config_class(**SHARED, **special, num_hidden_layers=LAYERS + modules, num_mtp_layers=modules)
    whole = model_class(config).eval().requires_grad_(False)
    for weight in whole.parameters():
        if weight.ndim == 1:
            weight.uniform_(0.5, 1.5)
    whole.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for i in range(LAYERS, LAYERS + modules):
        for role in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"model.layers.{i}.{role}.weight"] = torch.rand(HIDDEN) + 0.5
        tensors[f"model.layers.{i}.eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN) / HIDDEN**0.5
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    written |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": modules}
    (path / "config.json").write_text(json.dumps(written))

    target = model_class.from_pretrained(path, attn_implementation="eager").eval().requires_grad_(False)
    head = read_head(path).head
    # transformers finds the head's tensors by the layer numbers of the published models.
    target._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS + i}\." for i in range(modules)]
    assert head.family == name and head.formula == Formula(mask_first_position=True)
    # transformers does not mask the embedding at position 0.
    head = replace(head, formula=replace(head.formula, mask_first_position=False))
    blocks = [causal(layer, whole.model.rotary_emb) for layer in whole.model.layers[LAYERS:]]
    outer = {"embedding": tensors["model.embed_tokens.weight"], "head": tensors["lm_head.weight"]}
    ours = ReferenceHead.of(head, tensors, blocks, outer, config.rms_norm_eps)
    tokens = torch.randint(0, WORDS, (1, 12))
    hidden = target.model(tokens).last_hidden_state
    return Pair(target, MtpModel.from_pretrained(target).eval().requires_grad_(False), ours, tokens, hidden)


def theirs(pair: Pair, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(1, tokens.shape[1])[None]
    cache = MtpCache(config=pair.theirs.config)
    drafted, logits, _ = pair.theirs(tokens[:, 1:], hidden[:, : tokens.shape[1] - 1], None, positions, cache)
    return drafted, logits


def test_drafts_as_transformers_does(pair: Pair) -> None:
    k = len(pair.ours.depths)
    drafted, logits = theirs(pair, pair.tokens, pair.hidden)
    ours, our_logits = pair.ours.draft(pair.tokens, pair.hidden[:, :-1], k)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, drafted) and logits.std() > 0.1


def test_teacher_forcing_gives_the_logits_of_every_prefix(pair: Pair) -> None:
    forced = pair.ours.forward(pair.tokens, pair.hidden)
    assert [logits.shape[1] for logits in forced] == [11, 10][: len(forced)]
    for end in range(2, 13):
        _, logits = theirs(pair, pair.tokens[:, :end], pair.hidden)
        torch.testing.assert_close(forced[0][:, end - 2], logits[:, 0], rtol=1e-4, atol=1e-4)
    # The second module follows the drafted token, so its prefix is one that the head drafted itself.
    drafted, logits = theirs(pair, pair.tokens, pair.hidden)
    grown = torch.cat([pair.tokens, drafted[:, :1]], 1)
    forced = pair.ours.forward(grown, pair.target.model(grown).last_hidden_state)
    for depth, row in enumerate(forced):
        torch.testing.assert_close(row[:, 10], logits[:, depth], rtol=1e-4, atol=1e-4)


def test_one_module_goes_on_as_transformers_does_with_its_cache(pair: Pair) -> None:
    if len(pair.ours.depths) == 2:
        with pytest.raises(FourfoldError, match="k=3: a head of 2 modules"):
            pair.ours.draft(pair.tokens, pair.hidden[:, :-1], 3)
        return
    states: list[Tensor] = []
    handle = pair.theirs.layers[0].register_forward_hook(lambda module, args, out: states.append(out))  # type: ignore[arg-type]
    cache, rows, tokens = MtpCache(config=pair.theirs.config), [], pair.tokens[:, 1:]
    hidden, positions = pair.hidden[:, :-1], torch.arange(1, 12)[None]
    for _ in range(4):
        tokens, logits, _ = pair.theirs(tokens, hidden, None, positions, cache)
        rows.append(logits)
        hidden, positions = states[-1][:, -1:], positions[:, -1:] + 1
    handle.remove()
    _, ours = pair.ours.draft(pair.tokens, pair.hidden[:, :-1], 4)
    torch.testing.assert_close(ours, torch.cat(rows, 1), rtol=1e-4, atol=1e-4)


def test_hidden_first_as_transformers_does(pair: Pair) -> None:
    ours = ReferenceHead(replace(pair.ours.formula, embedding_first=False), pair.ours.depths, pair.ours.eps, None)
    pair.theirs.config.mtp_hidden_states_first = True
    try:
        _, logits = theirs(pair, pair.tokens, pair.hidden)
    finally:
        pair.theirs.config.mtp_hidden_states_first = False
    _, our_logits = ours.draft(pair.tokens, pair.hidden[:, :-1], len(ours.depths))
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, theirs(pair, pair.tokens, pair.hidden)[1], atol=0.1)


def llama_head(formula: Formula, **weights: Tensor | None) -> ReferenceHead:
    """A head of one random Llama layer; ``weights`` replaces roles, None removes them."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3
    )
    config._attn_implementation = "eager"
    layer = LlamaDecoderLayer(config, 0).eval().requires_grad_(False)
    roles: dict[str, Tensor | None] = {name: torch.rand(HIDDEN) for name in ("enorm", "hnorm", "norm")}
    roles["eh_proj"] = torch.randn(HIDDEN, 2 * HIDDEN) / 8
    roles["embedding"], roles["head"] = torch.randn(WORDS, HIDDEN), torch.randn(WORDS, HIDDEN)
    kept = {role: weight for role, weight in (roles | weights).items() if weight is not None}
    depth = Depth(kept, causal(layer, LlamaRotaryEmbedding(config)))
    return ReferenceHead(formula, [depth], 1e-6, (lambda x: x * 3 - 1) if formula.target_embedding_norm else None)


def inputs(batch: int = 3, size: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, WORDS, (batch, size), generator=generator)
    return tokens, torch.randn(batch, size - 1, HIDDEN, generator=generator)


def test_the_mask_zeroes_the_first_embedding() -> None:
    tokens, hidden = inputs()
    table = llama_head(Formula()).depths[0].weights["embedding"].clone()
    table[0] = 0
    masked = llama_head(Formula(mask_first_position=True), embedding=table)
    plain = llama_head(Formula(), embedding=table)
    zeroed = tokens.clone()
    zeroed[:, 1] = 0
    torch.testing.assert_close(masked.draft(tokens, hidden, 3), plain.draft(zeroed, hidden, 3))
    assert not torch.allclose(masked.draft(tokens, hidden, 1)[1], plain.draft(tokens, hidden, 1)[1])


def test_unit_offset_norms_are_norms_of_a_larger_weight() -> None:
    tokens, hidden = inputs()
    offset = llama_head(Formula(unit_offset_norm=True))
    weights = offset.depths[0].weights
    plain = llama_head(Formula(), **{role: weights[role] + 1 for role in ("enorm", "hnorm", "norm")})
    torch.testing.assert_close(offset.draft(tokens, hidden, 3), plain.draft(tokens, hidden, 3))


def test_two_projections_are_the_halves_of_one() -> None:
    tokens, hidden = inputs()
    whole = llama_head(Formula())
    first, second = whole.depths[0].weights["eh_proj"].chunk(2, 1)
    for formula, parts in ((Formula(), (first, second)), (Formula(embedding_first=False), (second, first))):
        split = llama_head(formula, eh_proj=None, e_proj=parts[0], h_proj=parts[1])
        torch.testing.assert_close(split.draft(tokens, hidden, 3), llama_head(formula).draft(tokens, hidden, 3))


def test_the_targets_norm_of_embeddings_comes_first() -> None:
    tokens, hidden = inputs()
    normed = llama_head(Formula(target_embedding_norm=True))
    table = normed.depths[0].weights["embedding"] * 3 - 1
    torch.testing.assert_close(
        normed.draft(tokens, hidden, 3), llama_head(Formula(), embedding=table).draft(tokens, hidden, 3)
    )
    with pytest.raises(FourfoldError, match="pass the target's norm"):
        ReferenceHead(Formula(target_embedding_norm=True), normed.depths, 1e-6, None)


def test_feedback_before_and_after_the_norm() -> None:
    tokens, hidden = inputs()
    pre, post = llama_head(Formula(feedback="pre_norm")), llama_head(Formula(feedback="post_norm"))
    drafted, logits = post.draft(tokens, hidden, 2)
    other = pre.draft(tokens, hidden, 2)[1]
    torch.testing.assert_close(other[:, 0], logits[:, 0])
    # hnorm undoes the scale of the state but not the weight of the norm, so only a constant weight makes them equal.
    assert not torch.allclose(other[:, 1], logits[:, 1], atol=0.1)
    even = torch.full((HIDDEN,), 0.5)
    equal = [llama_head(Formula(feedback=f), norm=even).draft(tokens, hidden, 2)[1] for f in ("pre_norm", "post_norm")]
    torch.testing.assert_close(equal[0], equal[1], rtol=1e-4, atol=1e-4)
    state = pre.step(0, tokens[:, 1:], hidden)[1][:, -1:]
    grown = torch.cat([tokens, drafted[:, :1]], 1)
    expected = pre.step(0, grown[:, 1:], torch.cat([hidden, state], 1))[0][:, -1]
    torch.testing.assert_close(other[:, 1], expected)


def test_without_a_norm_both_feedbacks_are_the_state_of_the_logits() -> None:
    tokens, hidden = inputs()
    heads = [llama_head(Formula(feedback=f), norm=None) for f in ("pre_norm", "post_norm")]
    torch.testing.assert_close(heads[0].draft(tokens, hidden, 3), heads[1].draft(tokens, hidden, 3))
    logits, state = heads[0].step(0, tokens[:, 1:], hidden)
    torch.testing.assert_close(logits, state @ heads[0].depths[0].weights["head"].T)


@pytest.mark.parametrize("uses", ["embedding", "hidden"])
@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_head_that_knows_the_target_is_always_accepted(uses: str, embedding_first: bool) -> None:
    """The target walks a cycle; the head reads the next word from the embedding or from the hidden state."""
    words, k = 32, 4
    order = torch.randperm(words, generator=torch.Generator().manual_seed(3))
    permutation = torch.empty_like(order).scatter(0, order, order.roll(-1))
    unit = torch.eye(words)
    walk, none = unit[:, permutation], torch.zeros(words, words)
    # The hidden state is that of the token before, so the head walks once before the output head does again.
    halves = [none, walk] if uses == "hidden" else [unit, none]
    right = torch.cat(halves if embedding_first else halves[::-1], 1)
    outer = {"embedding": unit, "head": walk}
    module = Module({role: f"m.{role}" for role in ("enorm", "hnorm", "eh_proj", "norm")}, "m.block", {})
    tensors = {f"m.{role}.weight": torch.ones(words) for role in ("enorm", "hnorm", "norm")}
    start = torch.arange(words)[:, None]
    sequence = [start]
    for _ in range(k + 3):
        sequence.append(permutation[sequence[-1]])
    known = torch.cat(sequence, 1)
    tokens, hidden = known[:, :3], unit[known[:, :2]]

    def accepted(projection: Tensor) -> list[int]:
        description = MtpHead("test", Formula(embedding_first), (module,), 1, words)
        weights = tensors | {"m.eh_proj.weight": projection}
        draft, _ = ReferenceHead.of(description, weights, [lambda x, _: x], outer, 1e-6).draft(tokens, hidden, k)
        return verify_greedy(known[:, 3 : 4 + k], draft).accepted.tolist()

    assert accepted(right) == [k] * words
    assert accepted(right.roll(words, 1)) == [0] * words


def test_what_is_missing_is_named() -> None:
    tokens, hidden = inputs()
    head = llama_head(Formula())
    with pytest.raises(FourfoldError, match=r"hidden has shape \(3, 7, 64\); 8 tokens of 3"):
        head.draft(tokens, hidden[:, 1:], 1)
    module = Module({"enorm": "a", "hnorm": "b", "eh_proj": "c"}, "d", {})
    description = MtpHead("test", Formula(), (module,), 2, HIDDEN)
    tensors = {"a.weight": torch.ones(HIDDEN), "b.weight": torch.ones(HIDDEN)}
    with pytest.raises(FourfoldError, match="tensor c.weight is missing"):
        ReferenceHead.of(description, tensors, [lambda x, _: x], {}, 1e-6)
    with pytest.raises(FourfoldError, match="0 blocks for 1 modules"):
        ReferenceHead.of(description, tensors, [], {}, 1e-6)

"""A tiny model whose greedy continuation is known exactly, with an MTP head whose every draft is known too.

The hidden state of token t is the one-hot vector e_t and the output head maps e_t to the logit of ``PERMUTATION[t]``,
so greedy decoding walks one cycle through all 256 tokens. The head (`HEADS`) computes e of the next token from what a
real one has: the target's hidden state, the embedding, its own attention over its own KV cache, its own MLP and norms.
A shifted position, exchanged halves of the projection, a dropped weight, a stale cache entry or a wrong hidden state
turns the drafts into other tokens, and acceptance from 100 % into 0 %: acceptance is an exact assertion.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from fourfold.common.mtp.layouts import FAMILIES, Family

SIZE = 256  # hidden size, vocabulary and inner size
LAYERS, ATTENTION_HEADS, HEAD_DIM, ROPE_THETA = 2, 4, 64, 10000.0
NORM = SIZE**0.5  # what an RMS norm makes of a one-hot vector
BAD = frozenset(range(0, SIZE, 5))  # tokens after which the head "bad" is wrong

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": ATTENTION_HEADS,
    "num_key_value_heads": ATTENTION_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": SIZE,
    "max_position_embeddings": 2048,
    "rope_theta": ROPE_THETA,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "bfloat16",
}


def _cycle(seed: int) -> tuple[list[int], list[int]]:
    order = list(range(SIZE))
    random.Random(seed).shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return order, [following[i] for i in range(SIZE)]


ORDER, PERMUTATION = _cycle(0)
_SCRAMBLE = _cycle(1)[1]  # the code between attention and MLP of the head, which only its own weights undo
_MARK, _JUNK, MARK, DROWN = ORDER[-1], ORDER[-4], 0.5, 2.0  # tokens that no test reaches

# right: needs all of its parts; swapped: takes the embedding for the hidden state; bad: wrong after `BAD`; embedding:
# needs the embedding alone; pre_norm, post_norm: right for that feedback, else wrong from the second draft on; first,
# second: right as that one of two modules, the first by the hidden state, the second by the embedding; first bad: and
# one token ahead after `BAD`.
HEADS = ("right", "swapped", "bad", "embedding", "pre_norm", "post_norm", "first", "second", "first bad")


def continuation(token: int, count: int) -> list[int]:
    """The ``count`` tokens that follow ``token`` greedily."""
    out = [token]
    for _ in range(count):
        out.append(PERMUTATION[out[-1]])
    return out[1:]


def prompt(start: int, length: int = 4) -> list[int]:
    """A prompt of the model's own text."""
    return [start, *continuation(start, length - 1)]


def probability(scale: float) -> float:
    """The target's probability of the following token at temperature 1; all others share the rest equally."""
    top = torch.tensor(scale * NORM).exp().item()
    return top / (top + SIZE - 1)


def chi_square(prompts: Sequence[list[int]], outputs: Sequence[list[int]], scale: float) -> float:
    """Of tokens sampled at temperature 1, with 51 degrees of freedom: 0.1 % of draws are above 88."""
    counts = [0] * 52  # the following token; the others by fives, all equally likely
    for text, tokens in zip(prompts, outputs, strict=True):
        for last, token in zip([text[-1], *tokens], tokens, strict=False):
            counts[-(-((ORDER.index(token) - ORDER.index(last) - 1) % SIZE) // 5)] += 1
    total, p = sum(counts), probability(scale)
    expected = [total * p] + [total * (1 - p) / 51] * 51
    square = sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True))
    print(f"chi-square {square:.1f} with 51 degrees of freedom, {total} tokens")
    return square


def expected_drafts(
    text: list[int], tokens: int, k: int, wrong: Container[int] = (), depth: int | None = None
) -> tuple[int, list[int]]:
    """What an engine counts while it answers with ``tokens`` tokens, drafting ``k``: (steps, accepted by position).

    Args:
        text: the prompt.
        wrong: tokens after which (three places before the drafted one) the head is wrong.
        depth: drafts of a step that can be right; None: all.
    """
    text = [*text, *continuation(text[-1], tokens + k + 1)]
    steps, accepted, at = 0, [0] * k, len(text) - tokens - k
    while at < len(text) - k - 1:
        good = 0
        while good < min(k, k if depth is None else depth) and text[at + good - 3] not in wrong:
            accepted[good] += 1
            good += 1
        steps, at = steps + 1, at + good + 1
    return steps, accepted


def _map(permutation: list[int], scale: float = 1.0) -> Tensor:
    """[SIZE, SIZE], takes e_t to ``scale`` times e of its image."""
    matrix = torch.zeros(SIZE, SIZE)
    matrix[permutation, range(SIZE)] = scale
    return matrix


def _inverse(permutation: list[int]) -> list[int]:
    return [permutation.index(i) for i in range(SIZE)]


def _compose(*permutations: list[int]) -> list[int]:
    """The first is applied last."""
    out = list(range(SIZE))
    for permutation in reversed(permutations):
        out = [permutation[i] for i in out]
    return out


def _attend_to_previous(sharpness: float = 24.0) -> tuple[Tensor, Tensor]:
    """q_proj and k_proj that attend to the position before, whatever the tokens are."""
    half = HEAD_DIM // 2
    angles = ROPE_THETA ** (-torch.arange(half) / half)
    query = torch.cat([angles.cos(), -angles.sin()])  # turned back by one position
    key = torch.cat([torch.ones(half), torch.zeros(half)])
    scale = (sharpness * HEAD_DIM**0.5) ** 0.5 / NORM
    return tuple(v.repeat(ATTENTION_HEADS)[:, None].repeat(1, SIZE) * scale for v in (query, key))  # type: ignore


def _layer(prefix: str) -> dict[str, Tensor]:
    """A decoder layer that adds nothing to the residual stream."""
    generator = torch.Generator().manual_seed(len(prefix))
    matrices = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    tensors = {f"{prefix}.{m}_proj.weight": torch.randn(SIZE, SIZE, generator=generator) / NORM for m in matrices}
    tensors |= {f"{prefix}.{m}_proj.weight": torch.zeros(SIZE, SIZE) for m in ("self_attn.o", "mlp.down")}
    return tensors | {f"{prefix}.{n}_layernorm.weight": torch.ones(SIZE) for n in ("input", "post_attention")}


def _block(prefix: str, out: Tensor, down: Tensor) -> dict[str, Tensor]:
    """A decoder layer whose attention takes the token before to ``out``, and whose MLP that to ``down``."""
    identity, tensors = torch.eye(SIZE), _layer(prefix)
    tensors |= {f"{prefix}.self_attn.{m}_proj.weight": w for m, w in zip("qk", _attend_to_previous(), strict=True)}
    tensors |= {f"{prefix}.self_attn.v_proj.weight": identity, f"{prefix}.self_attn.o_proj.weight": out}
    mlp = {"gate": identity / 2, "up": identity, "down": down}
    return tensors | {f"{prefix}.mlp.{name}_proj.weight": weight for name, weight in mlp.items()}


@dataclass(frozen=True)
class Architecture:
    """The decoder layers of a model, as `_layer` and `_block`.

    Attributes:
        config: beside `CONFIG`.
        attends: the target's last layer is a block, which finds the token of its position from the one before: its
            text is right only where its attention is.
    """

    config: dict[str, Any]
    layer: Callable[[str], dict[str, Tensor]]
    block: Callable[[str, Tensor, Tensor], dict[str, Tensor]]
    attends: bool = False


LLAMA = Architecture({}, _layer, _block)


def _head(family: Family, kind: str, n: int, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of module ``n``."""
    prefix = family.prefixes[0]
    names = {role: prefix + name.format(n=n, layer=LAYERS + n) for role, name in family.roles.items()}
    block = prefix + family.block.format(n=n, layer=LAYERS + n)
    signs = torch.tensor([1.0, -1.0]).repeat(SIZE // 2)
    one = float(not family.formula.unit_offset_norm)
    weights = {"enorm": signs, "hnorm": -signs, "norm": 1 + torch.arange(SIZE) / SIZE}
    identity = torch.eye(SIZE)
    embedding, hidden = torch.zeros(SIZE, SIZE), identity / NORM
    if kind in ("embedding", "pre_norm", "post_norm"):
        tensors = architecture.layer(block)
        if kind == "embedding":
            embedding, hidden = identity, torch.zeros(SIZE, SIZE)
        else:
            hidden, weights["norm"] = _feedback(kind)
    else:
        # Large, so that the state is one-hot again.
        steps = [PERMUTATION] * (1 if kind == "second" else 2)
        down = _map(_compose(*steps, _inverse(_SCRAMBLE)), NORM)
        marked = kind in ("first", "second", "first bad")
        if marked:
            weights["norm"] = torch.ones(SIZE)
            embedding, hidden = _marked(kind, down)
        if kind == "bad":
            down[:, [_SCRAMBLE[t] for t in BAD]] = 0
        elif kind == "swapped":
            embedding, hidden = hidden, embedding
        tensors = architecture.block(block, _map(_SCRAMBLE), down)
        if marked:  # a drowned state is attended to as any other
            for name in "qk":
                tensors[f"{block}.self_attn.{name}_proj.weight"][:, _JUNK] *= ((1 + DROWN**2) ** 0.5 - 1) / DROWN
    halves = [embedding * weights["enorm"], hidden * weights["hnorm"]]
    tensors[f"{names['eh_proj']}.weight"] = torch.cat(halves if family.formula.embedding_first else halves[::-1], 1)
    for role, weight in weights.items():
        tensors[f"{names[role]}.weight"] = weight - 1 + one
    return tensors


def _feedback(kind: str) -> tuple[Tensor, Tensor]:
    """Projection of the hidden state and weight of the norm of a head that tells the two kinds of feedback apart."""
    if kind == "post_norm":
        # The norm turns the sign, which only a state that passed it has back.
        return -_map(PERMUTATION), -torch.ones(SIZE)
    # The norm drops the mark that the target's states have, and without it `_JUNK` drowns the token.
    hidden, norm = _map(PERMUTATION), torch.ones(SIZE)
    hidden[_MARK] = MARK
    hidden[_JUNK] += 2
    hidden[:, _MARK] = 0
    hidden[_JUNK, _MARK] = -2 / MARK
    norm[_MARK] = 0
    return hidden, norm


def _marked(kind: str, down: Tensor) -> tuple[Tensor, Tensor]:
    """Projections of a module that is right in its place alone; ``down`` of the first sets a mark in its state.

    The first drowns the token in `_JUNK` where the state that it reads has the mark, the second where it has not.
    """
    embedding, hidden = torch.zeros(SIZE, SIZE), torch.eye(SIZE) / NORM
    if kind == "second":
        embedding, hidden = hidden, embedding
        hidden[_JUNK] = DROWN / NORM
        hidden[_JUNK, [_JUNK, _MARK]] = torch.tensor([0, -DROWN / MARK / NORM])
    else:
        hidden[_JUNK, _MARK] = DROWN / MARK / NORM
        down[_MARK] = MARK * NORM
        down[_MARK, [_SCRAMBLE[_MARK], _SCRAMBLE[_JUNK]]] = 0
    for token in BAD if kind == "first bad" else ():
        right, wrong = continuation(token, 3)[1:]
        down[[wrong, right], _SCRAMBLE[token]] = torch.tensor([NORM, 0])
    return embedding, hidden


def write_oracle(
    path: Path,
    family: str = "deepseek_v3",
    heads: tuple[str, ...] = ("right",),
    scale: float = 1.0,
    architecture: Architecture = LLAMA,
) -> tuple[Path, Path]:
    """Write below ``path`` the target alone and the target with its head, two model directories; return both.

    They are two because the engines' Llama refuses a checkpoint with more tensors than it has.

    Args:
        family: whose tensor names and formula the head follows (`layouts.FAMILIES`).
        heads: kind (`HEADS`) of each module.
        scale: of the output head; below 1, sampling at temperature 1 takes other tokens too.
        architecture: of target and head.
    """
    found = next(f for f in FAMILIES if f.name == family)
    tensors = {"model.embed_tokens.weight": torch.eye(SIZE), "model.norm.weight": torch.ones(SIZE)}
    tensors["lm_head.weight"] = _map(PERMUTATION, scale)
    if "pre_norm" in heads:
        tensors["model.embed_tokens.weight"][:, _MARK] += MARK
        tensors["lm_head.weight"][:, _MARK] = 0
    for i in range(LAYERS - architecture.attends):
        tensors |= architecture.layer(f"model.layers.{i}")
    if architecture.attends:
        down = _map(_compose(PERMUTATION, _inverse(_SCRAMBLE)), NORM)
        tensors |= architecture.block(f"model.layers.{LAYERS - 1}", _map(_SCRAMBLE), down)
    head = {name: t for n, kind in enumerate(heads) for name, t in _head(found, kind, n, architecture).items()}
    target, whole = path / "target", path / "model"
    _write_model(target, tensors, architecture.config)
    _write_model(whole, tensors | head, architecture.config | {"num_nextn_predict_layers": len(heads)})
    return target, whole


def _write_model(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    path.mkdir(parents=True)
    plain = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(plain, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    tokenizer = Tokenizer(models.WordLevel({character(i): i for i in range(SIZE)}, unk_token=character(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def character(token: int) -> str:
    """The one letter that ``token`` stands for."""
    return chr(0x100 + token)

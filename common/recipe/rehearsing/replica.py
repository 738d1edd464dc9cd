"""A small random model in the published layout of its family, whose greedy text is known.

The hidden state of token t is close to the one-hot vector e_t: every layer computes in full with random weights, but
adds little. The output head takes e_t to the logit of the next token of one cycle through the vocabulary. The MTP head
drafts from the embedding of the last token in the same way, except after every fifth token (`WRONG`), where it drafts
another one: a server that verifies drafts accepts most of them, and not all.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.common.recipe.rehearsing.traits import ARCHITECTURES, Family, Traits

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 256  # hidden size and vocabulary
INNER, EXPERT_INNER, EXPERTS, HEADS, HEAD_DIM = 256, 64, 8, 4, 64
LAYERS = 3
Q_RANK, KV_RANK, ROPE_DIM, NOPE_DIM, V_DIM = 64, 512, 64, 128, 128  # the sizes that vLLM's MLA kernel for CPUs takes
LITTLE = 0.01  # what a layer adds to each element of the hidden state, whose one element is 1
AGAIN = 64  # tokens before a text begins once more
WRONG = frozenset(range(0, SIZE, 5))


@dataclass(frozen=True)
class Replica:
    """A model that was written.

    Attributes:
        model: directory to serve.
        draft: draft directory of fourfold's head, for an engine without a class for the family's own; None: the
            checkpoint holds the head.
    """

    model: Path
    draft: Path | None
    traits: Traits


def cycle() -> list[int]:
    """For each token the one that follows it."""
    order = list(range(SIZE))
    random.Random(0).shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [following[token] for token in range(SIZE)]


def character(token: int) -> str:
    """The letter that stands for a token."""
    return chr(0x100 + token)


def prompts(count: int) -> list[str]:
    """Texts of different lengths, each a part of the cycle; every sixth begins once more: drafts can be read there."""
    following, out = cycle(), []
    for i in range(count):
        tokens = [(37 * i + 11) % SIZE]
        for _ in range(3 + 5 * i % 17):
            tokens.append(following[tokens[-1]])
        if i % 6 == 5:
            for _ in range(AGAIN):
                tokens.append(following[tokens[-1]])
            tokens += tokens[:8]
        out.append("".join(map(character, tokens)))
    return out


def continuation(text: str, tokens: int) -> str:
    """What the replica answers greedily."""
    following, token, out = cycle(), ord(text[-1]) - 0x100, []
    for _ in range(tokens):
        token = following[token]
        out.append(character(token))
    return "".join(out)


def write_replica(path: Path, traits: Traits, engine: str, drafts: bool) -> Replica:
    """Write a model below the new directory ``path``.

    Args:
        drafts: with an MTP head.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    family = traits.family
    config = _config(traits)
    tensors = _target(family, traits, generator)
    head = _head(family, traits, generator) if drafts else {}
    own = drafts and family != "llama" and engine == "vllm"  # the engine's class of the family reads one checkpoint
    model = path / "model"
    nextn = {"num_nextn_predict_layers": 1}
    _write(model, tensors | (head if own else {}), config | (nextn if own else {}))
    if not drafts or own:
        return Replica(model, None, traits)
    from fourfold.common.mtp.extract import extract

    whole, draft = path / "with-head", path / "draft"
    _write(whole, tensors | head, config | nextn)
    extract(whole, draft, "vllm" if engine == "vllm" else "sglang")
    return Replica(model, draft, traits)


def _config(traits: Traits) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[traits.family]],
        "model_type": traits.family,
        "hidden_size": SIZE,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": _heads(traits)[0],
        "num_key_value_heads": _heads(traits)[1],
        "vocab_size": SIZE,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
    }
    if traits.family == "llama":
        return config | {"head_dim": HEAD_DIM}
    config |= {
        "moe_intermediate_size": EXPERT_INNER,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": min(traits.top_k, EXPERTS // 2),
        "n_shared_experts": max(1, traits.shared),
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": traits.dense,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "attention_bias": False,
    }
    if traits.family == "glm4_moe":
        return config | {"head_dim": HEAD_DIM, "use_qk_norm": True, "partial_rotary_factor": 0.5}
    config |= {
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": Q_RANK,
        "kv_lora_rank": KV_RANK,
        "qk_rope_head_dim": ROPE_DIM,
        "qk_nope_head_dim": NOPE_DIM,
        "v_head_dim": V_DIM,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "ep_size": 1,
    }
    # As published. SGLang takes no other rotations for MLA on a processor; without scaling vLLM 0.32 gives there
    # probabilities that are up to 0.1 nats from those of transformers.
    config["rope_scaling"] = {
        "type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    return config


def _heads(traits: Traits) -> tuple[int, int]:
    """Heads of queries, and of keys and values, in the model's ratio, rounded to a power of two up to 8."""
    return (HEADS, HEADS) if traits.ratio == 1 else (2 << min(traits.ratio.bit_length() - 1, 3), 2)


def _target(family: Family, traits: Traits, generator: Any) -> dict[str, Tensor]:
    import torch

    following = cycle()
    head = torch.zeros(SIZE, SIZE)
    head[following, range(SIZE)] = 1
    tensors = {"model.embed_tokens.weight": torch.eye(SIZE), "model.norm.weight": torch.ones(SIZE)}
    tensors["lm_head.weight"] = head
    for layer in range(LAYERS):
        tensors |= _layer(family, traits, f"model.layers.{layer}", layer, generator)
    return tensors


def _head(family: Family, traits: Traits, generator: Any) -> dict[str, Tensor]:
    """The tensors of one MTP module in DeepSeek's layout, which GLM has too."""
    import torch

    prefix = f"model.layers.{LAYERS}"
    tensors = _layer(family, traits, prefix, LAYERS, generator)
    embedding = torch.eye(SIZE)
    for token in WRONG:
        embedding[:, token] = embedding[:, (token + 1) % SIZE]
    little = torch.randn(SIZE, SIZE, generator=generator) * LITTLE / SIZE**0.5
    tensors[f"{prefix}.eh_proj.weight"] = torch.cat([embedding, little], 1)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(SIZE)
    if family != "llama":  # the published checkpoints of these families repeat them
        following = cycle()
        output = torch.zeros(SIZE, SIZE)
        output[following, range(SIZE)] = 1
        tensors |= {f"{prefix}.embed_tokens.weight": torch.eye(SIZE), f"{prefix}.shared_head.head.weight": output}
    return tensors


def _layer(family: Family, traits: Traits, prefix: str, number: int, generator: Any) -> dict[str, Tensor]:
    import torch

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * scale / columns**0.5

    tensors = {f"{prefix}.{name}_layernorm.weight": torch.ones(SIZE) for name in ("input", "post_attention")}
    attention = f"{prefix}.self_attn"
    if family == "deepseek_v3":
        tensors |= {
            f"{attention}.q_a_proj.weight": matrix(Q_RANK, SIZE),
            f"{attention}.q_a_layernorm.weight": torch.ones(Q_RANK),
            f"{attention}.q_b_proj.weight": matrix(HEADS * (NOPE_DIM + ROPE_DIM), Q_RANK),
            f"{attention}.kv_a_proj_with_mqa.weight": matrix(KV_RANK + ROPE_DIM, SIZE),
            f"{attention}.kv_a_layernorm.weight": torch.ones(KV_RANK),
            f"{attention}.kv_b_proj.weight": matrix(HEADS * (NOPE_DIM + V_DIM), KV_RANK),
            f"{attention}.o_proj.weight": matrix(SIZE, HEADS * V_DIM, LITTLE),
        }
    else:
        query, shared = _heads(traits)
        for name, heads in (("q", query), ("k", shared), ("v", shared)):
            tensors[f"{attention}.{name}_proj.weight"] = matrix(heads * HEAD_DIM, SIZE)
        tensors[f"{attention}.o_proj.weight"] = matrix(SIZE, query * HEAD_DIM, LITTLE)
        if family == "glm4_moe":
            tensors |= {f"{attention}.{name}_norm.weight": torch.ones(HEAD_DIM) for name in "qk"}

    def mlp(name: str, inner: int) -> dict[str, Tensor]:
        parts = {"gate": matrix(inner, SIZE), "up": matrix(inner, SIZE), "down": matrix(SIZE, inner, LITTLE)}
        return {f"{name}.{part}_proj.weight": weight for part, weight in parts.items()}

    if family == "llama" or number < traits.dense:
        return tensors | mlp(f"{prefix}.mlp", INNER)
    tensors[f"{prefix}.mlp.gate.weight"] = matrix(EXPERTS, SIZE)
    tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = torch.rand(EXPERTS, generator=generator) / 10
    for expert in range(EXPERTS):
        tensors |= mlp(f"{prefix}.mlp.experts.{expert}", EXPERT_INNER)
    return tensors | mlp(f"{prefix}.mlp.shared_experts", EXPERT_INNER * max(1, traits.shared))


def _write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    kept = {
        name: tensor if name.endswith("correction_bias") else tensor.to(torch.bfloat16)
        for name, tensor in tensors.items()
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in kept.items()}, path / "model.safetensors", {"format": "pt"}
    )
    (path / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(path, SIZE)


def write_tokenizer(path: Path, size: int) -> None:
    """A tokenizer of ``size`` letters, and a chat template, into the directory of a model."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({character(i): i for i in range(size)}, unk_token=character(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    given = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(given))

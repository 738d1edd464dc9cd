"""Draft models that are checkpoints of their own, DSpark's and EAGLE3's, small and in their published layouts.

A draft reads hidden states of its target at layers that its config names: sizes, layers and vocabulary follow the small
target. Which draft a recipe means is in its options; what the draft is, in the config of its card.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rehearsing.formats import Shapes
from fourfold.common.recipe.rehearsing.published import Published, save, shrunken, write_published
from fourfold.common.recipe.rehearsing.stated import Config, Named, Stated, every_layer, linear, norms, shapes_of

EAGLE3 = range(3)  # layers of the target that EAGLE3 reads where its config does not say it
INNER = "transformer_layer_config"  # of configs in the form of the library speculators, which bring their own tables


@dataclass(frozen=True)
class Draft:
    """A kind of draft model.

    Attributes:
        method: vLLM's name of it.
        source: where its names were read.
        stated: its tensors; ``targets`` in a size is how many layers of the target it reads.
        tables: embeddings and head, which some bring.
    """

    method: str
    source: str
    stated: tuple[Stated, ...]
    tables: bool = False


def _targets(config: Config) -> Iterable[int]:
    return range(len(config["targets"]))


_H, _I, _Q, _KV = "hidden_size", "intermediate_size", "num_attention_heads * head_dim", "num_key_value_heads * head_dim"


def _layer(width: str) -> Named:
    """A dense layer with grouped-query attention over ``width`` inputs."""
    return {
        **linear(*((f"self_attn.{one}_proj", _KV, width) for one in "kv"), ("self_attn.q_proj", _Q, width)),
        **linear(
            ("self_attn.o_proj", _H, _Q), ("mlp.down_proj", _H, _I), ("mlp.gate_proj", _I, _H), ("mlp.up_proj", _I, _H)
        ),
        **norms("input_layernorm", "post_attention_layernorm"),
    }


_TABLES = Stated("", linear(("embed_tokens", "vocab_size", _H), ("lm_head", "vocab_size", _H)))
_FC = linear(("fc", _H, "targets * hidden_size"))
DRAFTS: dict[str, Draft] = {
    "DSparkDraftModel": Draft(
        "dspark",
        "tools/k3_dspark_stagepack.py of sparkpipe, which reads the header of RedHatAI/Kimi-K3-speculator.dspark",
        (
            Stated(
                "layers.{n}.",
                {**_layer(_H), **norms("self_attn.q_norm", "self_attn.k_norm", width="head_dim")},
                every_layer,
            ),
            Stated(
                "",
                {
                    **_FC,
                    **norms("hidden_norm", "norm"),
                    **linear(
                        *((f"markov_head.{one}", "vocab_size", "markov_rank") for one in ("markov_w1", "markov_w2"))
                    ),
                    **linear(("confidence_head.proj", 1, "hidden_size + markov_rank")),
                    "confidence_head.proj.bias": ((1,), "bfloat16"),
                },
            ),
        ),
    ),
    "LlamaForCausalLMEagle3": Draft(
        "eagle3",
        "rtp_llm/models/minimax_m3_eagle3.py of RTP-LLM, which refuses other names",
        (
            Stated("layers.{n}.", {**_layer("2 * hidden_size"), **norms("hidden_norm")}, every_layer),
            Stated("", {**_FC, **norms("norm")}),
            Stated("fc_norm.{n}.", {"weight": ((_H,), "bfloat16")}, _targets),
        ),
        tables=True,
    ),
}


def named(given: Mapping[str, Any]) -> str | None:
    """The draft model that the options name."""
    asked = given.get("speculative-config")
    model = asked.get("model") if isinstance(asked, Mapping) else given.get("speculative-draft-model-path")
    return None if model is None else str(model)


def config_of(catalogue: Catalogue, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of the draft model that the options name; None: they name none, or none that has a card."""
    repo = named(given)
    return next((catalogue.config(card.id) for card in catalogue.draft_models() if card.repo == repo), None)


def known(config: Config) -> bool:
    """Whether the names of such a draft's tensors are known."""
    return _kind(config) in DRAFTS


def _kind(config: Config) -> str:
    return str((config.get("architectures") or ["unknown"])[0])


def write(path: Path, target: Config, config: Config | None) -> Published:
    """Write a small checkpoint of the target and, beside it in ``draft``, one of a draft model that is `known`.

    Args:
        path: of the target's; a new directory.
        config: of the draft model; None: there is none.

    Raises:
        FourfoldError: as `write_published`.
    """
    published = write_published(path, target)
    if config is None or not known(config):
        return published
    draft = DRAFTS[_kind(config)]
    outer = json.loads((published.path / "config.json").read_text())
    small = _small(config, outer.get("text_config", outer))
    beside = path.with_name("draft")
    count = save(beside, shapes(small), small, small.get(INNER, small), "")
    source = f"{published.source}; the draft: {draft.source}"
    return replace(published, tensors=published.tensors + count, draft=draft.method, draft_path=beside, source=source)


def shapes(config: Config) -> Shapes:
    """The names of all tensors of a draft model of this config, which is `known`."""
    draft = DRAFTS[_kind(config)]
    tables = (_TABLES,) if draft.tables or INNER in config else ()
    dflash = config.get("dflash_config", {})
    targets = config.get("aux_hidden_state_layer_ids") or dflash.get("target_layer_ids") or EAGLE3
    return shapes_of((*draft.stated, *tables), {**config, **config.get(INNER, {}), "targets": list(targets)})


def _small(config: Config, target: Config) -> dict[str, Any]:
    """The config for a small target."""
    inner, _ = shrunken(config.get(INNER, config))
    layers, last = int(target["num_hidden_layers"]), int(target["vocab_size"]) - 1
    small = {**config, INNER: inner} if INNER in config else inner
    if INNER in config:
        targets = list(range(layers))[-len(config["aux_hidden_state_layer_ids"]) :]
        small |= {"aux_hidden_state_layer_ids": [layer + 1 for layer in targets], "mask_token_id": last}
    elif "dflash_config" in config:
        targets = list(range(layers))[-len(config["dflash_config"]["target_layer_ids"]) :]
        small["dflash_config"] = {**config["dflash_config"], "target_layer_ids": targets, "mask_token_id": last}
        small["num_target_layers"] = layers
    if "draft_vocab_size" in config:
        small["draft_vocab_size"] = last + 1
    return small

"""A checkpoint in the published layout with one tensor under another name and one left out (tests only)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from fourfold.common.recipe.launch import engine_of
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rehearsing import drafts
from fourfold.common.recipe.rehearsing.loading import Loaded, chosen, load_checkpoint
from fourfold.common.recipe.rehearsing.published import Published

ORIGINAL, RENAMED = "layers.1.attn.indexer.wq_b.weight", "layers.1.attn.indexer.wq_bb.weight"
LEFT_OUT = "layers.3.ffn.experts.5.w2.weight"


def damaged(
    checkpoint: Published, folder: Path, original: str = ORIGINAL, renamed: str = RENAMED, left_out: str = LEFT_OUT
) -> Published:
    """A copy in the new directory ``folder``; the names are DeepSeek V4's unless they are given."""
    shutil.copytree(checkpoint.path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[renamed] = tensors.pop(original)
    del tensors[left_out]
    save_file(tensors, folder / "model.safetensors")
    return replace(checkpoint, path=folder, tensors=len(tensors))


def load_damaged(engine: str, known: Catalogue, name: str, folder: Path, damage: Mapping[str, str]) -> Loaded:
    """What a recipe's engine says of its model's checkpoint, its draft model's beside it, with such damage."""
    recipe = known.recipe(name)
    given = chosen(engine, engine_of(recipe, engine), "aggregated")
    whole = drafts.write(folder / "model", known.config(recipe.model), drafts.config_of(known, given))
    checkpoint = damaged(whole, folder / "damaged", **damage)
    return load_checkpoint(engine, checkpoint, given, known.hardware(recipe.hardware), {}, folder)

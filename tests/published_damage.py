"""A checkpoint in the published layout with one tensor under another name and one left out (tests only)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from fourfold.common.recipe.rehearsing.published import Published

ORIGINAL, RENAMED = "layers.1.attn.indexer.wq_b.weight", "layers.1.attn.indexer.wq_bb.weight"
LEFT_OUT = "layers.3.ffn.experts.5.w2.weight"


def damaged(checkpoint: Published, folder: Path) -> Published:
    """A copy of DeepSeek V4's in the new directory ``folder``."""
    shutil.copytree(checkpoint.path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[RENAMED] = tensors.pop(ORIGINAL)
    del tensors[LEFT_OUT]
    save_file(tensors, folder / "model.safetensors")
    return replace(checkpoint, path=folder, tensors=len(tensors))

"""Tensors that are stated as data: at the sizes of the published configs they have the published sizes, to the byte."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest

from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rehearsing import drafts
from fourfold.common.recipe.rehearsing.formats import EXPERT, Shapes
from fourfold.common.recipe.rehearsing.kimi_k3 import KIMI_K3
from fourfold.common.recipe.rehearsing.stated import shapes_of, size

BYTES = {"bfloat16": 2, "float32": 4, EXPERT: 1 / 2 + 1 / 32}  # an expert's in MXFP4


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return Catalogue()


def _numbers(shapes: Shapes) -> Iterable[tuple[int, str]]:
    return ((math.prod(shape), tag) for shape, tag in shapes.values())


def test_kimi_k3(known: Catalogue) -> None:
    config = known.config("kimi-k3")
    shapes = shapes_of(KIMI_K3, {**config, **config["text_config"]})
    assert sum(count * BYTES[tag] for count, tag in _numbers(shapes)) == known.model("kimi-k3").published_bytes


@pytest.mark.parametrize("name", ["kimi-k3-speculator.dspark", "minimax-m3-eagle3-gqa"])
def test_draft_models(known: Catalogue, name: str) -> None:
    shapes = drafts.shapes(known.config(name))
    parameters = sum(count for count, _ in _numbers(shapes))
    assert parameters == round(known.model(name).total_parameters * 1e9)


def test_sizes() -> None:
    config = {"heads": 2, "part": {"width": 5}, "layers": [1, 2, 3]}
    assert size("heads * part.width + 3 * layers", config) == 19
    assert size(("heads", "part.width", 2), config) == 20 and size(7, config) == 7

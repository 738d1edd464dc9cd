"""The draft vocabulary: its logits are those of the whole head at its words, in whole and in parts of a head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourfold.common.errors import FourfoldError
from fourfold.common.mtp.reader import read_head
from fourfold.common.mtp.vocabulary import DraftVocabulary
from tests import oracle

WORDS = torch.tensor([9, 2, 30, 17], dtype=torch.int32)
NAME = "model.layers.2.shared_head.vocabulary.weight"


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_logits_are_those_of_the_head(parts: int) -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(32, 8), torch.randn(5, 8)
    whole = hidden @ weight.T
    ranks = [DraftVocabulary(WORDS, part, i * 32 // parts) for i, part in enumerate(weight.chunk(parts))]
    logits = torch.cat([rank.logits(hidden) for rank in ranks], 1)
    others = torch.ones(32, dtype=torch.bool)
    others[WORDS.long()] = False
    torch.testing.assert_close(logits[:, WORDS.long()], whole[:, WORDS.long()])
    assert logits[:, others].isneginf().all()
    best = torch.stack([logits[:, i * 32 // parts : (i + 1) * 32 // parts].max(-1).values for i in range(parts)])
    for i, rank in enumerate(ranks):
        mine = best.argmax(0) == i
        assert torch.equal(rank.top(hidden)[mine], logits.argmax(-1)[mine]) if len(rank.rows) else not mine.any()


@pytest.mark.parametrize(
    "words",
    [
        torch.tensor([], dtype=torch.int32),
        torch.tensor([1, 1]),
        torch.tensor([-1, 1]),
        torch.tensor([[1, 2]]),
        torch.tensor([1.0, 2.0]),
    ],
)
def test_what_is_no_vocabulary(words: torch.Tensor) -> None:
    with pytest.raises(FourfoldError, match="a draft vocabulary"):
        DraftVocabulary(words, torch.randn(4, 2))


@pytest.mark.parametrize("wrong", [torch.tensor([1.0]), torch.tensor([[1, 2]])])
def test_a_checkpoint_with_a_vocabulary(tmp_path: Path, wrong: torch.Tensor) -> None:
    model = oracle.write_oracle(tmp_path)[1]
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {NAME: WORDS}, model / "model.safetensors", {"format": "pt"})
    reading = read_head(model)
    assert reading.head.modules[0].roles["vocabulary"] == NAME.removesuffix(".weight")
    assert json.loads(json.dumps(reading.head.to_config()))["modules"][0]["roles"]["vocabulary"]
    save_file(tensors | {NAME: wrong}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(FourfoldError, match="shared_head.vocabulary: "):
        read_head(model)

"""A draft vocabulary: the words that a head may draft, so that a draft step multiplies with these rows of the output
head alone (FR-Spec, arXiv 2502.14856). Words outside it get the logit -inf; verification stays over all words."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from fourfold.common.errors import FourfoldError

Product = Callable[[Tensor], Tensor]  # [T, H] to [T, W]


class DraftVocabulary:
    """The drafted rows of one rank's part of an output head.

    Args:
        words: [W] int, ids of the drafted words.
        weight: [rows, H], the rank's rows of the head, in floating point.
        start: the word of its first row.
        prepare: makes the product with a matrix [W, H], as an engine packs weights; None: PyTorch's.

    Raises:
        FourfoldError: no words, or a word twice or negative.
    """

    def __init__(
        self, words: Tensor, weight: Tensor, start: int = 0, prepare: Callable[[Tensor], Product] | None = None
    ) -> None:
        check_words(words)
        words = words.long().to(weight.device)
        self.rows = words[(words >= start) & (words < start + len(weight))] - start
        self.width, self.start = len(weight), start
        weight = weight[self.rows].contiguous()
        self.product: Product = prepare(weight) if prepare and len(weight) else lambda hidden: linear(hidden, weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, rows] logits of hidden [T, H], -inf at words that are not drafted."""
        out = hidden.new_full((hidden.shape[0], self.width), float("-inf"))
        return out.index_copy_(1, self.rows, self.product(hidden))

    def top(self, hidden: Tensor) -> Tensor:
        """[T] the likeliest drafted word of hidden [T, H], of this rank's part."""
        return self.rows[self.product(hidden).max(-1).indices] + self.start


def check_words(words: Tensor) -> None:
    """Raise a `FourfoldError` unless ``words`` are distinct ids."""
    if words.ndim != 1 or not len(words) or words.dtype not in (torch.int32, torch.int64):
        raise FourfoldError(f"a draft vocabulary is a list of token ids, found {list(words.shape)} of {words.dtype}")
    if int(words.min()) < 0 or len(words.unique()) != len(words):
        raise FourfoldError(f"a draft vocabulary has each word once: {len(words)} ids, {len(words.unique())} different")

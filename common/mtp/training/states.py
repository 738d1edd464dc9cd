"""The target's hidden states over dialogues, kept in one flat file: what a head is trained on, computed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.common.mtp.training.text import Dialogue

BATCH_TOKENS = 4096


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of sequences, those of like length together, so that a padded batch has at most ``tokens`` tokens."""
    found: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found[-1] and (len(found[-1]) + 1) * lengths[index] > tokens:
            found.append([])
        found[-1].append(index)
    return [batch for batch in found if batch]


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different length as one tensor, zeros behind them."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


class States:
    """Hidden states after the target's final norm, of every position but a dialogue's last, [*, H] in BF16.

    Args:
        path: the file; it is written whole under another name first.
    """

    def __init__(self, path: Path, dialogues: Sequence[Dialogue], hidden: int) -> None:
        self.path, self.hidden = path, hidden
        self.tokens = [torch.tensor(d.prompt + d.answer) for d in dialogues]
        self.prompts = [len(d.prompt) for d in dialogues]
        self.opening = len(os.path.commonprefix([d.prompt for d in dialogues]))  # of a template: nothing to learn
        self._starts = [0]
        for row in self.tokens:
            self._starts.append(self._starts[-1] + len(row) - 1)

    @property
    def complete(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == self._starts[-1] * self.hidden * 2

    def _open(self, path: Path) -> Tensor:
        count = self._starts[-1] * self.hidden
        return torch.from_file(str(path), shared=True, size=count, dtype=torch.bfloat16).view(-1, self.hidden)

    @torch.inference_mode()
    def compute(self, model: Any, tick: Callable[[int, int], None] = lambda done, all: None) -> None:
        """Write the file. ``tick`` is called with the positions done and all positions."""
        part = self.path.with_suffix(".part")
        part.unlink(missing_ok=True)
        out, done = self._open(part), 0
        device = next(model.parameters()).device
        for batch in batches([len(row) for row in self.tokens], BATCH_TOKENS):
            states = model.model(padded([self.tokens[i][:-1] for i in batch]).to(device)).last_hidden_state
            for row, i in zip(states, batch, strict=True):
                count = len(self.tokens[i]) - 1
                out[self._starts[i] : self._starts[i] + count] = row[:count].to("cpu", torch.bfloat16)
                done += count
            tick(done, self._starts[-1])
        del out
        part.rename(self.path)

    def load(self) -> None:
        """Map the file."""
        self._states = self._open(self.path)

    def batch(self, indices: Sequence[int], steps: int, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
        """A padded batch: tokens [B, T + steps], hidden [B, T, H], and which tokens count, [B, T + steps].

        Column i of hidden is position i, column i of the others token i + 1. The tokens of answers count, and where
        ``whole`` is set those of requests too.
        """
        tokens = [torch.cat([self.tokens[i][1:], torch.zeros(steps, dtype=torch.int64)]) for i in indices]
        answer = []
        for i, row in zip(indices, tokens, strict=True):
            places = torch.arange(len(row))
            first = self.opening if whole else self.prompts[i]
            answer.append((places >= first - 1) & (places < len(row) - steps))
        hidden = [self._states[self._starts[i] : self._starts[i + 1]] for i in indices]
        return padded(tokens), padded(hidden).float(), padded(answer)

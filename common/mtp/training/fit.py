"""Training: each step of the chain learns the target's distribution over the drafted words, in a few epochs.

The first epochs may leave out all steps but the first, which is most of what there is to learn, at a third of the cost.
Matrices learn by Muon (torch's; https://kellerjordan.github.io/posts/muon), norms by AdamW, warmed up, then cooled to
zero. The cross entropy of step s has weight ``DECAY ** s`` (FastMTP, arXiv 2509.18362). Whether a draft is accepted
depends on the text alone, since the target is greedy there, so `accepted` counts what an engine would accept, exactly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fourfold.common.mtp.training.distil import distil
from fourfold.common.mtp.training.head import TrainedHead
from fourfold.common.mtp.training.states import States, batches

DECAY = 0.7


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        steps: length of the chain.
        single_epochs: passes over the text with a chain of one.
        epochs: passes after these.
        batch_tokens: padded tokens of a batch.
        matrix_rate: Muon's learning rate.
        vector_rate: AdamW's learning rate.
        warmup: share of the batches.
        save_every: batches between two checkpoints, beside those of each epoch.
    """

    steps: int = 3
    single_epochs: int = 6
    epochs: int = 2
    batch_tokens: int = 1024
    matrix_rate: float = 0.005
    vector_rate: float = 0.002
    warmup: float = 0.03
    save_every: int = 50


class _WithoutBf16(TorchFunctionMode):
    """Leaves tensors as they are where BF16 is asked for: PyTorch's Muon does, on any processor."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


class Optimiser:
    """Muon and AdamW under one schedule."""

    def __init__(self, head: TrainedHead, plan: Plan, total: int) -> None:
        self.plan, self.total = plan, total
        matrices = [p for p in head.parameters() if p.ndim == 2]
        vectors = [p for p in head.parameters() if p.ndim != 2]
        muon = torch.optim.Muon(matrices, plan.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.parts: list[Any] = [muon, torch.optim.AdamW(vectors, plan.vector_rate, weight_decay=0.0)]
        self.rates = (plan.matrix_rate, plan.vector_rate)
        self.bf16 = in_bf16(head)

    def step(self, number: int) -> None:
        """One update; ``number`` of ``total``."""
        warm = max(1, int(self.plan.warmup * self.total))
        share = min(1.0, (number + 1) / warm) * (self.total - number) / self.total
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * share
            with nullcontext() if self.bf16 else _WithoutBf16():
                part.step()
            part.zero_grad()


def word_index(vocabulary: Tensor, words: int) -> Tensor:
    """[words] the place of each word in ``vocabulary``, -100 where it is not drafted."""
    places = torch.full((words,), -100)
    places[vocabulary] = torch.arange(len(vocabulary))
    return places


def chain(
    head: TrainedHead, places: Tensor, states: States, batch: Sequence[int], steps: int, whole: bool
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and which drafts are right: bool [steps, starts], one column for each start of a chain.

    Args:
        whole: chains start in requests too, else in answers only.
    """
    device = head.vocabulary.device
    tokens, hidden, answer = (tensor.to(device) for tensor in states.batch(batch, steps, whole))
    count = hidden.shape[1]
    starts = answer[:, :count]
    label = places[tokens]
    loss, right = torch.zeros((), device=device), []
    for step, feedback in enumerate(head.states(tokens, hidden, steps)):
        predicted = slice(step + 1, step + 1 + count)
        within = starts & answer[:, predicted]
        found = torch.zeros_like(within)
        row, column = (within & (label[:, predicted] >= 0)).nonzero(as_tuple=True)
        if len(row):
            after = column + step + 1  # the state of column i gives the distribution of the token of column i
            part, drafts = distil(feedback[row, column], hidden[row, after], head.words)
            loss = loss + DECAY**step * part / within.sum()
            found[row, column] = drafts == label[row, after]
        right.append(found[starts])
    return loss, torch.stack(right)


def accepted(right: Tensor, lengths: Sequence[int]) -> list[int]:
    """How many drafts an engine would accept, by position; the last entry is the number of steps it takes.

    Args:
        right: bool [k, starts], the dialogues one after the other.
        lengths: starts of each dialogue; the last of them, at its last token, begins no step.
    """
    runs = right.long().cumprod(0).sum(0).tolist()
    counts, begin = [0] * (right.shape[0] + 1), 0
    for length in lengths:
        at = begin
        while at < begin + length - 1:
            for position in range(runs[at]):
                counts[position] += 1
            counts[-1] += 1
            at += runs[at] + 1
        begin += length
    return counts


def in_bf16(head: TrainedHead) -> bool:
    """Whether products are of BF16: where the target's are."""
    return head.words.dtype == torch.bfloat16


def products(head: TrainedHead) -> torch.autocast:
    """Let them be."""
    return torch.autocast(head.words.device.type, torch.bfloat16, enabled=in_bf16(head))


@torch.no_grad()
def evaluate(head: TrainedHead, places: Tensor, states: States, held_out: Sequence[int], steps: int) -> list[float]:
    """Acceptance by position, and the mean acceptance length with the bonus token, over dialogues."""
    counts = [0] * (steps + 1)
    for batch in batches([len(states.tokens[i]) for i in held_out], 8192):
        chosen = [held_out[i] for i in batch]
        with products(head):
            _, right = chain(head, places, states, chosen, steps, False)
        lengths = [len(states.tokens[i]) - states.prompts[i] for i in chosen]
        counts = [a + b for a, b in zip(counts, accepted(right, lengths), strict=True)]
    shares = [count / counts[-1] for count in counts[:-1]]
    return [*shares, 1 + sum(shares)]


def fit(
    head: TrainedHead,
    states: States,
    training: Sequence[int],
    plan: Plan,
    words: int,
    checkpoint: Path,
    tick: Callable[[int, int, float, list[float]], None],
) -> None:
    """Train ``head`` on the dialogues ``training``, from ``checkpoint`` if it is there.

    Args:
        words: of the target's vocabulary.
        tick: called after each batch with its number, the number of batches, its loss, and the share of right drafts by
            position of the chain.
    """
    places = word_index(head.vocabulary.cpu(), words).to(head.vocabulary.device)
    grouped = batches([len(states.tokens[i]) for i in training], plan.batch_tokens)
    total = len(grouped) * (plan.single_epochs + plan.epochs)
    optimiser, start = Optimiser(head, plan, total), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        head.load_state_dict(saved["head"])
        for part, state in zip(optimiser.parts, saved["parts"], strict=True):
            part.load_state_dict(state)
        start = saved["done"]
    for number in range(start, total):
        epoch, place = divmod(number, len(grouped))
        order = list(range(len(grouped)))
        random.Random(epoch).shuffle(order)
        batch = [training[i] for i in grouped[order[place]]]
        with products(head):
            loss, right = chain(head, places, states, batch, 1 if epoch < plan.single_epochs else plan.steps, True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step(number)
        tick(number + 1, total, loss.item(), right.float().mean(1).tolist())
        if (number + 1) % plan.save_every == 0 or place + 1 == len(grouped):
            part = checkpoint.with_suffix(".part")
            saved = {"head": head.state_dict(), "parts": [p.state_dict() for p in optimiser.parts], "done": number + 1}
            torch.save(saved, part)
            part.rename(checkpoint)

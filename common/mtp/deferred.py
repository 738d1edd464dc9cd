"""Positions that an MTP head has yet to read, kept until it reads them all at once.

A head needs every position's hidden state for its KV cache, also of steps that draft nothing. Where several such steps
follow each other it may read their positions later, in one batch: before it drafts again, before a block of the cache
that holds one of them gets another reader, and before the room for hidden states is used up. Until then nobody reads
the cache entries that are missing; those in a block that gets another owner nobody will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
# (request, first position, end) to its blocks, and to its tokens from ``first`` to before ``end``.
Text = Callable[[str, int, int], tuple[Sequence[int], Sequence[int]]]


@dataclass(frozen=True)
class Batch:
    """What the head reads at once: T positions in R runs, each of one request and without a gap.

    Attributes:
        rows: [T] where the hidden states are.
        tokens: [T] the tokens after the positions.
        positions: [T].
        slots: [T] where the KV cache entries go.
        starts: [R + 1] bounds of the runs.
        lengths: [R] tokens of the context, with the run's own.
        blocks: [R, widest] blocks of the context, zeros after the last.
    """

    rows: Ints
    tokens: Ints
    positions: Ints
    slots: Ints
    starts: Ints
    lengths: Ints
    blocks: Ints


@dataclass
class _Run:
    """Positions of one request from ``start`` on; blocks and tokens once the request no longer answers for them."""

    start: int
    rows: list[int]
    blocks: Sequence[int] = ()
    tokens: Sequence[int] = ()

    @property
    def end(self) -> int:
        return self.start + len(self.rows)


class Deferred:
    """The positions, whose hidden states the caller stores in the rows that `add` names.

    Attributes:
        capacity: rows for hidden states.
        block_size: positions of a block of the KV cache.
        count: rows in use.
    """

    def __init__(self, capacity: int, block_size: int) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.count = 0
        self._runs: dict[str, list[_Run]] = {}
        self._left: list[_Run] = []
        self._blocks: set[int] = set()  # of requests that answer for their runs
        self._left_blocks: set[int] = set()

    def room(self, count: int) -> bool:
        """Whether ``count`` more positions fit."""
        return self.count + count <= self.capacity

    def add(self, requests: Sequence[str], starts: Ints, counts: Ints, table: Ints) -> int:
        """Take a step's positions, those of one request after those of the other; the first row to store them in.

        Args:
            starts: [B] first position of each request.
            counts: [B] positions of each.
            table: [B, any] blocks of each request's context.
        """
        first = self.count
        if counts.max() == 1:
            self._blocks.update(table[np.arange(len(requests)), starts // self.block_size].tolist())
        else:
            for row, start, count in zip(table, starts, counts, strict=True):
                self._blocks.update(row[start // self.block_size : (start + count - 1) // self.block_size + 1].tolist())
        for request, start, count in zip(requests, starts.tolist(), counts.tolist(), strict=True):
            runs = self._runs.setdefault(request, [])
            if not runs or runs[-1].end != start:  # near the longest text, vLLM's head skips steps
                runs.append(_Run(start, []))
            runs[-1].rows.extend(range(self.count, self.count + count))
            self.count += count
        return first

    def leave(self, requests: Iterable[str], text: Text) -> None:
        """Ask for blocks and tokens of requests that end, or get other blocks; their blocks are still as they were."""
        for request in requests:
            for run in self._runs.pop(request, ()):
                run.blocks, run.tokens = text(request, run.start + 1, run.end + 1)
                self._left.append(run)
                held = run.blocks[run.start // self.block_size : (run.end - 1) // self.block_size + 1]
                self._blocks.difference_update(held)
                self._left_blocks.update(held)

    def touches(self, blocks: Iterable[int]) -> bool:
        """Whether one of ``blocks`` holds a position that was not read."""
        blocks = set(blocks)
        return not (self._blocks.isdisjoint(blocks) and self._left_blocks.isdisjoint(blocks))

    def forget(self, blocks: Iterable[int]) -> None:
        """Drop what requests that left had in ``blocks``, which get another owner: no one reads these entries again."""
        gone = self._left_blocks.intersection(blocks)
        if gone:
            self._left_blocks -= gone
            self._left = [part for run in self._left for part in self._without(run, gone)]

    def _without(self, run: _Run, gone: set[int]) -> Iterator[_Run]:
        """The parts of ``run`` in other blocks."""
        first = run.start
        while first < run.end:
            index = first // self.block_size
            end = min(run.end, (index + 1) * self.block_size)
            if run.blocks[index] not in gone:
                own = slice(first - run.start, end - run.start)
                yield _Run(first, run.rows[own], run.blocks, run.tokens[own])
            first = end

    def take(self, text: Text, most: int) -> Iterator[Batch]:
        """All positions, in batches of at most ``most`` runs, short ones first; afterwards there are none."""
        self.leave(list(self._runs), text)
        runs = sorted(self._left, key=lambda run: len(run.rows))  # as an engine's attention wants them
        self._left = []
        self.count = 0
        self._blocks.clear()
        self._left_blocks.clear()
        for i in range(0, len(runs), most):
            yield self._batch(runs[i : i + most])

    def _batch(self, runs: Sequence[_Run]) -> Batch:
        widths = [(run.end - 1) // self.block_size + 1 for run in runs]
        blocks = np.zeros((len(runs), max(widths)), np.int32)
        for row, run, width in zip(blocks, runs, widths, strict=True):
            row[:width] = run.blocks[:width]
        counts = [len(run.rows) for run in runs]
        positions = np.concatenate([np.arange(run.start, run.end) for run in runs])
        owners = np.repeat(np.arange(len(runs)), counts)
        block = blocks[owners, positions // self.block_size].astype(np.int64)
        return Batch(
            rows=np.concatenate([run.rows for run in runs]),
            tokens=np.concatenate([run.tokens for run in runs]).astype(np.int32),
            positions=positions,
            slots=block * self.block_size + positions % self.block_size,
            starts=np.cumsum([0, *counts], dtype=np.int32),
            lengths=np.array([run.end for run in runs], np.int32),
            blocks=blocks,
        )

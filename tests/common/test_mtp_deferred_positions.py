"""What an MTP head reads late is what it would have read, whatever became of the requests meanwhile."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from fourfold.common.mtp.deferred import Batch, Deferred

SIZE, CAPACITY = 4, 64


class Server:
    """Requests with texts and blocks; every position read is checked against what the step would have read."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.deferred = Deferred(CAPACITY, SIZE)
        self.texts: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.done: dict[str, int] = {}
        self.states: list[tuple[int, int]] = [(-1, -1)] * CAPACITY  # by row: token and position that it is of
        self.expected: dict[int, tuple[int, int, int]] = {}  # by slot: token, position and the token after it
        self.free = list(range(1, 140))
        self.read = self.forgotten = 0
        self.batches = 0

    def text(self, request: str, first: int, end: int) -> tuple[Sequence[int], Sequence[int]]:
        return list(self.blocks[request]), self.texts[request][first:end]

    def add(self, name: str) -> None:
        self.texts[name] = [self.chance.randrange(1000) for _ in range(self.chance.randrange(1, 20))]
        self.blocks[name], self.done[name] = [], 0

    def step(self) -> None:
        """Each request reads up to five tokens of its prompt, or its last one, and gets another at its end."""
        names = [name for name in self.texts if self.chance.random() < 0.9]
        if not names:
            return
        starts = np.array([self.done[name] for name in names], np.int32)
        counts = np.array([min(5, len(self.texts[name]) - self.done[name]) for name in names], np.int32)
        for name, start, count in zip(names, starts.tolist(), counts.tolist(), strict=True):
            missing = (start + count - 1) // SIZE + 1 - len(self.blocks[name])
            new = [self.free.pop(0) for _ in range(missing)]
            self.deferred.forget(new)
            assert not self.deferred.touches(new)
            for slot in [slot for slot in self.expected if slot // SIZE in new]:
                self.expected.pop(slot)
                self.forgotten += 1
            self.blocks[name] += new
        if not self.deferred.room(int(counts.sum())):
            self.take()
        table = np.zeros((len(names), max(len(self.blocks[name]) for name in names)), np.int32)
        for row, name in zip(table, names, strict=True):
            row[: len(self.blocks[name])] = self.blocks[name]
        at = self.deferred.add(names, starts, counts, table)
        for name, start, count in zip(names, starts.tolist(), counts.tolist(), strict=True):
            text = self.texts[name]
            self.done[name] = start + count
            if self.done[name] == len(text):
                text.append(self.chance.randrange(1000))
            for p in range(start, start + count):
                self.states[at], at = (text[p], p), at + 1
                self.expected[self.blocks[name][p // SIZE] * SIZE + p % SIZE] = (text[p], p, text[p + 1])

    def end(self, name: str) -> None:
        self.deferred.leave([name], self.text)
        self.texts.pop(name)
        self.free = [*reversed(self.blocks.pop(name)), *self.free]

    def take(self) -> None:
        for batch in self.deferred.take(self.text, 3):
            self.batches += 1
            self.check(batch)
        assert not self.expected and not self.deferred.count

    def check(self, batch: Batch) -> None:
        assert len(batch.lengths) <= 3 and batch.starts[0] == 0 and batch.starts[-1] == len(batch.rows)
        bounds = zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True)
        for (start, end), length, blocks in zip(bounds, batch.lengths.tolist(), batch.blocks, strict=True):
            positions = batch.positions[start:end].tolist()
            assert positions == list(range(length - (end - start), length))
            for i, p in zip(range(start, end), positions, strict=True):
                slot = int(batch.slots[i])
                assert slot == blocks[p // SIZE] * SIZE + p % SIZE
                token, position = self.states[batch.rows[i]]
                assert self.expected.pop(slot) == (token, position, batch.tokens[i]) and position == p
                self.read += 1


def test_all_is_read_once_with_the_token_that_follows() -> None:
    forgotten = 0
    for seed in range(40):
        server = Server(seed)
        for step in range(120):
            if len(server.texts) < 5 and server.chance.random() < 0.5:
                server.add(f"r{step}")
            if server.texts and server.chance.random() < 0.1:
                server.end(server.chance.choice(list(server.texts)))
            server.step()
        server.take()
        assert server.read > 200 and server.batches > 3
        forgotten += server.forgotten
    assert forgotten > 100


def test_a_block_of_an_ended_request_is_read_before_it_has_another_reader() -> None:
    deferred = Deferred(16, SIZE)
    deferred.add(["a"], np.array([6]), np.array([4]), np.array([[7, 8, 9]]))
    assert deferred.touches([9]) and deferred.touches([3, 8]) and not deferred.touches([7, 3])
    deferred.leave(["a", "b"], lambda request, first, end: ([7, 8, 9], list(range(first, end))))
    assert deferred.touches([8])
    (batch,) = deferred.take(lambda *_: ([], []), 8)
    assert batch.slots.tolist() == [34, 35, 36, 37] and batch.tokens.tolist() == [7, 8, 9, 10]
    assert not deferred.touches([8, 9]) and deferred.room(16) and not deferred.room(17)


def test_what_an_ended_request_had_in_a_block_of_another_is_forgotten() -> None:
    deferred = Deferred(32, SIZE)
    table = np.array([[7, 8, 9, 5], [1, 2, 3, 4]])
    deferred.add(["a", "b"], np.array([2, 0]), np.array([11, 2]), table)
    deferred.forget([8, 1])  # both requests run
    assert deferred.touches([8]) and deferred.touches([1])
    deferred.leave(["a"], lambda _, first, end: ([7, 8, 9, 5], list(range(first, end))))
    deferred.forget([8, 5, 6])
    assert not deferred.touches([8, 5]) and deferred.touches([7]) and deferred.touches([9])
    (batch,) = deferred.take(lambda _, first, end: ([1, 2, 3, 4], list(range(first, end))), 8)
    assert sorted(batch.positions.tolist()) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert dict(zip(batch.positions.tolist(), batch.rows.tolist(), strict=True)) == {
        **{2: 0, 3: 1, 8: 6, 9: 7, 10: 8, 11: 9},
        **{0: 11, 1: 12},
    }
    assert batch.slots.tolist()[-4:] == [36, 37, 38, 39]


def test_a_request_whose_positions_have_a_gap_is_read_in_two_runs() -> None:
    deferred = Deferred(16, SIZE)
    table = np.array([[1, 2, 3]])
    deferred.add(["a"], np.array([2]), np.array([1]), table)
    deferred.add(["a"], np.array([3]), np.array([1]), table)
    deferred.add(["a"], np.array([9]), np.array([1]), table)
    (batch,) = deferred.take(lambda _, first, end: ([1, 2, 3], list(range(first, end))), 8)
    assert batch.positions.tolist() == [9, 2, 3] and batch.starts.tolist() == [0, 1, 3]
    assert batch.lengths.tolist() == [10, 4] and batch.blocks.tolist() == [[1, 2, 3], [1, 0, 0]]

"""Slot tables: where some slots were evicted, each head's blocks are tabled and mapped for the decoder."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.runtime.behaviours.base import Interpreter

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import SlotTables
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine, Feeds

Ids = NDArray[np.int64]


def block_ends(numbers: Ids, join: int) -> Ids:
    """Slots behind each block of a head: runs of one number, of which neighbours are joined up to `join` slots.

    Args:
        numbers: `[live]` of its slots. The last run is a block of its own.
    """
    if not len(numbers):
        return np.zeros(0, np.int64)
    ends = np.append(np.flatnonzero(np.diff(numbers)) + 1, len(numbers))
    length = np.diff(ends, prepend=0)
    if len(ends) < 3 or (length[:-2] + length[1:-1]).min() > join:
        return ends.astype(np.int64)
    joined: list[int] = []
    start = 0
    for end in ends[:-1].tolist():
        if joined and end - start <= join:
            joined[-1] = end
        else:
            start = joined[-1] if joined else 0
            joined.append(end)
    return np.array([*joined, len(numbers)], np.int64)


class SlotTabulator(Interpreter):
    """Interprets `SlotTables`.

    Tables follow from the slot column alone; what is noted here is only what saves work: lengths that are expected
    where nothing was evicted or taken back, and which blocks are mapped.
    """

    def __init__(self, behaviour: SlotTables, engine: Engine, slots: Slots) -> None:
        super().__init__()
        self.behaviour, self._engine, self._slots = behaviour, engine, slots
        heads = [len(group.heads) for group in engine.contract.cache.groups]
        last = np.cumsum(heads)
        self._heads = [slice(end - count, end) for end, count in zip(last.tolist(), heads, strict=True)]
        self.ends = np.zeros((engine.batch, int(last[-1]), behaviour.most), np.int64)
        self._mapped = np.zeros_like(self.ends)
        self._length = np.zeros(slots.length.shape, np.int64)
        self._number = np.full(engine.batch, -1, np.int64)

    def step_inputs(self, rows: slice, tokens: int) -> Feeds:
        return {self.behaviour.input: self.ends[rows]}

    def before_append(self, count: Ids) -> None:
        self._follow()

    def appended(self, row: int, ids: Ids) -> None:
        self._follow(len(ids), row)

    def end_turn(self, rows: NDArray[np.bool_]) -> None:
        self._follow()

    def compress(self, rows: NDArray[np.bool_]) -> None:
        self._follow()

    def reset(self, rows: NDArray[np.bool_]) -> None:
        super().reset(rows)
        self._forget(rows)

    def restore(self, state: dict[str, Ids], rows: slice) -> None:
        self._forget(rows)

    def taken_back(self, row: int) -> None:
        self._forget(slice(row, row + 1))

    def take_back(self, snapshot: object) -> None:
        self._forget(slice(None))

    def _forget(self, rows: slice | NDArray[np.bool_]) -> None:
        """Knows nothing of these rows: with tokens they are tabled and mapped anew."""
        self.ends[rows], self._mapped[rows] = 0, 0
        self._length[:, rows], self._number[rows] = 0, -1

    def _follow(self, count: int = 0, grown: int | None = None) -> None:
        """Brings tables up to what the slots are now.

        Args:
            count: tokens appended to the row `grown`.
        """
        length = self._slots.length
        for row in map(int, np.flatnonzero((length != self._length).any(0))):
            before, now = self._length[:, row], length[:, row]
            if row == grown and before.all() and (now - before == count).all() and self._stays_open(row):
                for group, heads in enumerate(self._heads):
                    of_row = self.ends[row, heads]
                    of_row[of_row == before[group]] = now[group]
            else:
                for group, heads in enumerate(self._heads):
                    if now[group] < before[group]:
                        self._mapped[row, heads] = 0
                    self._table(row, group, heads)
                self._number[row] = self._last_number(row)
                self._map(row)
            self._length[:, row] = now

    def _last_number(self, row: int) -> int:
        live = int(self._slots.length[0, row])
        return int(self._slots.columns[self.behaviour.column][0][row, 0, live - 1]) if live else -1

    def _stays_open(self, row: int) -> bool:
        """Whether what was appended is in the block that was open: heads end in the same window of tokens."""
        return self._last_number(row) == self._number[row]

    def _table(self, row: int, group: int, heads: slice) -> None:
        live = int(self._slots.length[group, row])
        column = self._slots.columns[self.behaviour.column][group][row, :, :live]
        self.ends[row, heads] = 0
        for head, numbers in zip(range(heads.start, heads.stop), column, strict=True):
            ends = block_ends(numbers, self.behaviour.join)
            self.ends[row, head, : len(ends)] = ends

    def _map(self, row: int) -> None:
        """Runs the program for the row's blocks that are not mapped as they are; no head's last, which is open."""
        started = time.perf_counter()
        ends, mapped, most = self.ends[row], self._mapped[row], self.behaviour.most
        starts, starts_mapped = (np.pad(each[:, :-1], ((0, 0), (1, 0))) for each in (ends, mapped))
        count = (ends > 0).sum(-1, keepdims=True)
        wanted = ((ends != mapped) | (starts != starts_mapped)) & (np.arange(most) < count - 1)
        for run in range(-(-int(wanted.sum(-1).max()) // self.behaviour.closed)):
            feeds = {}
            for group, heads in enumerate(self._heads):
                shape = (self._engine.batch, heads.stop - heads.start, self.behaviour.closed)
                start, length, number = (np.full(shape, value, np.int64) for value in (0, 0, most - 1))
                for head in range(heads.start, heads.stop):
                    first = run * self.behaviour.closed
                    blocks = np.flatnonzero(wanted[head])[first : first + self.behaviour.closed]
                    place = (row, head - heads.start, slice(0, len(blocks)))
                    start[place], number[place] = starts[head, blocks], blocks
                    length[place] = ends[head, blocks] - starts[head, blocks]
                if length.any():
                    feeds[group] = {"block_start": start, "block_length": length, "block_number": number}
            self._engine.run_groups(self.behaviour.program, feeds)
        mapped[:] = np.where(np.arange(most) < count - 1, ends, 0)
        self.stats.seconds += time.perf_counter() - started

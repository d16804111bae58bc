"""Block tables: what is appended is cut into blocks; the decoder is told where they end, and closed ones are mapped."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.runtime.behaviours.segmenting import Segmenting

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import BlockTables
    from semkv_deploy.model.blocks import SegmenterState
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine, Feeds


class BlockTabulator(Segmenting):
    """Interprets `BlockTables`.

    A block that a failed call closed was mapped where the next one that closes will be: nothing has to be undone there.
    """

    def __init__(self, behaviour: BlockTables, engine: Engine, slots: Slots) -> None:
        super().__init__(behaviour, engine, slots)
        self.behaviour, self._engine = behaviour, engine
        self.ends = np.zeros((engine.batch, behaviour.most), np.int64)

    def step_inputs(self, rows: slice, tokens: int) -> Feeds:
        return {self.behaviour.input: self.ends[rows]}

    def appended(self, row: int, ids: NDArray[np.int64]) -> None:
        segmenter, ends = self.segmenters[row], self.ends[row]
        first = segmenter.closed
        start = int(ends[first - 1]) if first else 0
        lengths = segmenter.append(ids)
        if lengths:
            ends[first : first + len(lengths)] = start + np.cumsum(lengths)
            self._map(row, first, start, np.array(lengths, np.int64))
        ends[segmenter.closed] = self._slots.position[row] if segmenter.open else 0

    def _map(self, row: int, first: int, start: int, lengths: NDArray[np.int64]) -> None:
        """Runs the program for blocks that lie one after the other."""
        started = time.perf_counter()
        shape = (len(self.segmenters), self.behaviour.closed)
        begins, length = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        number = np.full(shape, self.behaviour.most - 1, np.int64)
        count = len(lengths)
        begins[row, :count] = start + np.cumsum(lengths) - lengths
        length[row, :count], number[row, :count] = lengths, first + np.arange(count)
        feeds = {"block_start": begins, "block_length": length, "block_number": number}
        groups = range(len(self._engine.contract.cache.groups))
        self._engine.run_groups(self.behaviour.program, dict.fromkeys(groups, feeds))
        self.stats.seconds += time.perf_counter() - started

    def reset(self, rows: NDArray[np.bool_]) -> None:
        super().reset(rows)
        self.ends[rows] = 0

    def state(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        return {**super().state(rows), "ends": self.ends[rows].copy()}

    def restore(self, state: dict[str, NDArray[np.int64]], rows: slice) -> None:
        super().restore(state, rows)
        self.ends[rows] = state["ends"]

    def _restored(self, row: int, state: SegmenterState) -> None:
        self.ends[row, state.closed :] = 0
        self.ends[row, state.closed] = self._slots.position[row] if state.open else 0

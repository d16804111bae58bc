"""Blocks: what is appended is cut into semantic blocks, and every slot knows the number of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.methods.layout import POSITION
from semkv_deploy.model.blocks import TURN, Segmenter, SegmenterState
from semkv_deploy.runtime.behaviours.base import Interpreter

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import Blocks
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine


class BlockKeeper(Interpreter):
    """Interprets `Blocks`."""

    def __init__(self, behaviour: Blocks, engine: Engine, slots: Slots) -> None:
        super().__init__()
        self.behaviour = behaviour
        self._slots = slots
        codes = behaviour.codes(engine.opened.is_delimiter)
        self.segmenters = [Segmenter(behaviour, codes) for _ in range(engine.batch)]
        self._begun = self.snapshot()

    def begin_turn(self, rows: NDArray[np.bool_]) -> None:
        for row in map(int, np.flatnonzero(rows)):
            self._begun[row] = self.segmenters[row].state

    def appended(self, row: int, ids: NDArray[np.int64]) -> None:
        segmenter = self.segmenters[row]
        before, first = len(segmenter.open), segmenter.closed
        lengths = segmenter.append(ids)
        numbers = first + np.repeat(np.arange(len(lengths) + 1), [*lengths, len(segmenter.open)])
        # A token that was open before and still is has its number already.
        self._write(row, numbers if lengths else numbers[before:])

    def _write(self, row: int, numbers: NDArray[np.int64]) -> None:
        """Gives the row's last tokens, one a number, their numbers, in slots that still hold them."""
        slots, count = self._slots, len(numbers)
        first = int(slots.position[row]) - count
        for group, column in enumerate(slots.columns[self.behaviour.column]):
            live = int(slots.length[group, row])
            held = slice(max(live - count, 0), live)
            token = slots.columns[POSITION][group][row, :, held] - first
            written = column[row, :, held]
            written[...] = np.where(token >= 0, numbers[np.maximum(token, 0)], written)

    def taken_back(self, row: int) -> None:
        self._restore(row, self._begun[row])

    def reset(self, rows: NDArray[np.bool_]) -> None:
        super().reset(rows)
        for row in np.flatnonzero(rows):
            self.segmenters[row].restore(SegmenterState((), (0,) * len(self.behaviour.domains), 0))

    def state(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        """`open` `[B,longest]`: codes of the open block's tokens, at least `TURN`, then less; `sums` `[B,domains]`;
        `closed` `[B]`."""
        segmenters = self.segmenters[rows]
        codes = np.full((len(segmenters), self.behaviour.longest), TURN - 1, np.int64)
        for number, segmenter in enumerate(segmenters):
            codes[number, : len(segmenter.open)] = segmenter.open
        sums = np.array([segmenter.sums for segmenter in segmenters], np.int64)
        return {"open": codes, "sums": sums, "closed": np.array([each.closed for each in segmenters], np.int64)}

    def restore(self, state: dict[str, NDArray[np.int64]], rows: slice) -> None:
        most = len(self.behaviour.token_ids)
        for number, segmenter in enumerate(self.segmenters[rows]):
            # A file that says otherwise was not saved by a session: what no block can be is not taken.
            codes = state["open"][number, : self.behaviour.longest - 1].tolist()
            held = next((n for n, code in enumerate(codes) if not TURN <= code <= most), len(codes))
            sums = tuple(state["sums"][number].tolist())
            segmenter.restore(SegmenterState(tuple(codes[:held]), sums, int(state["closed"][number])))

    def snapshot(self) -> list[SegmenterState]:
        return [segmenter.state for segmenter in self.segmenters]

    def take_back(self, snapshot: object) -> None:
        assert isinstance(snapshot, list)
        for row, state in enumerate(snapshot):
            self._restore(row, state)

    def _restore(self, row: int, state: SegmenterState) -> None:
        segmenter = self.segmenters[row]
        if segmenter.state != state:
            segmenter.restore(state)
            self._write(row, np.full(len(state.open), state.closed))

"""What behaviours that cut text into semantic blocks share: a segmenter a row, saved, undone and forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from semkv_deploy.model.blocks import TURN, Segmenter, SegmenterState
from semkv_deploy.runtime.behaviours.base import Interpreter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.methods.behaviours import Blocks, BlockTables
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine


class Segmenting(Interpreter):
    """Cuts what is appended into blocks; a subclass says what a block is for."""

    def __init__(self, behaviour: Blocks | BlockTables, engine: Engine, slots: Slots) -> None:
        super().__init__()
        self._rule, self._slots = behaviour, slots
        codes = behaviour.codes(engine.opened.is_delimiter)
        self.segmenters = [Segmenter(behaviour, codes) for _ in range(engine.batch)]
        self._begun = self.snapshot()

    def _restored(self, row: int, state: SegmenterState) -> None:
        """Called after a row's segmenter was set back to `state`; slots have their positions and lengths of then."""

    def begin_turn(self, rows: NDArray[np.bool_]) -> None:
        for row in map(int, np.flatnonzero(rows)):
            self._begun[row] = self.segmenters[row].state

    def taken_back(self, row: int) -> None:
        self._restore(row, self._begun[row])

    def reset(self, rows: NDArray[np.bool_]) -> None:
        super().reset(rows)
        for row in map(int, np.flatnonzero(rows)):
            self.segmenters[row].restore(SegmenterState((), (0,) * len(self._rule.domains), 0))

    def state(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        """`open` `[B,longest]`: codes of the open block's tokens, at least `TURN`, then less; `sums` `[B,domains]`;
        `closed` `[B]`."""
        segmenters = self.segmenters[rows]
        codes = np.full((len(segmenters), self._rule.longest), TURN - 1, np.int64)
        for number, segmenter in enumerate(segmenters):
            codes[number, : len(segmenter.open)] = segmenter.open
        sums = np.array([segmenter.sums for segmenter in segmenters], np.int64)
        return {"open": codes, "sums": sums, "closed": np.array([each.closed for each in segmenters], np.int64)}

    def restore(self, state: dict[str, NDArray[np.int64]], rows: slice) -> None:
        most = len(self._rule.token_ids)
        for number, segmenter in enumerate(self.segmenters[rows]):
            # A file that says otherwise was not saved by a session: what no block can be is not taken.
            codes = state["open"][number, : self._rule.longest - 1].tolist()
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
        if self.segmenters[row].state != state:
            self.segmenters[row].restore(state)
            self._restored(row, state)

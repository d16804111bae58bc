"""Blocks: what is appended is cut into semantic blocks, and every slot knows the number of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.methods.layout import POSITION
from semkv_deploy.model.blocks import Segmenter, SegmenterState
from semkv_deploy.runtime.behaviours.base import CompressionStats
from semkv_deploy.runtime.behaviours.segmenters import forgotten, restored, saved

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import Blocks
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine, Feeds


class BlockKeeper:
    """Interprets `Blocks`."""

    makes_room = False
    changes, changing = 0, False

    def __init__(self, behaviour: Blocks, engine: Engine, slots: Slots) -> None:
        self.behaviour, self.stats = behaviour, CompressionStats()
        self._slots = slots
        codes = behaviour.codes(engine.opened.is_delimiter)
        self.segmenters = [Segmenter(behaviour, codes) for _ in range(engine.batch)]

    def step_inputs(self, rows: slice, tokens: int) -> Feeds:
        return {}

    def before_append(self, count: NDArray[np.int64]) -> None:
        """Needs no room."""

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

    def end_turn(self, rows: NDArray[np.bool_]) -> None:
        """Cuts nothing: a turn's marker does."""

    def compress(self, rows: NDArray[np.bool_]) -> None:
        """Compresses nothing."""

    def reset(self, rows: NDArray[np.bool_]) -> None:
        forgotten(self.segmenters, rows)

    def state(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        return saved(self.segmenters[rows], self.behaviour)

    def restore(self, state: dict[str, NDArray[np.int64]], rows: slice) -> None:
        restored(self.segmenters[rows], self.behaviour, state)

    def snapshot(self) -> list[SegmenterState]:
        return [segmenter.state for segmenter in self.segmenters]

    def take_back(self, snapshot: object) -> None:
        assert isinstance(snapshot, list)
        for row, state in enumerate(snapshot):
            segmenter = self.segmenters[row]
            if segmenter.state != state:
                segmenter.restore(state)
                self._write(row, np.full(len(state.open), state.closed))

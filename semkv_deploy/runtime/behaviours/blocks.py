"""Blocks: what is appended is cut into semantic blocks, and every slot knows the number of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.methods.layout import POSITION
from semkv_deploy.runtime.behaviours.segmenting import Segmenting

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import Blocks
    from semkv_deploy.model.blocks import SegmenterState
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine


class BlockKeeper(Segmenting):
    """Interprets `Blocks`."""

    def __init__(self, behaviour: Blocks, engine: Engine, slots: Slots) -> None:
        super().__init__(behaviour, engine, slots)
        self.behaviour = behaviour

    def appended(self, row: int, ids: NDArray[np.int64]) -> None:
        segmenter = self.segmenters[row]
        before, first = len(segmenter.open), segmenter.closed
        lengths = segmenter.append(ids)
        numbers = first + np.repeat(np.arange(len(lengths) + 1), [*lengths, len(segmenter.open)])
        # A token that was open before and still is has its number already.
        self._write(row, numbers if lengths else numbers[before:])

    def _restored(self, row: int, state: SegmenterState) -> None:
        self._write(row, np.full(len(state.open), state.closed))

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

"""What a session knows of its slots: how many are live in each group and row, and which token each stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.methods.layout import CHUNK, POSITION
from semkv_deploy.model.delimiters import ChunkCounter

if TYPE_CHECKING:
    from semkv_deploy.bundle.contract import Contract


class Slots:
    """Counters and slot columns of every row.

    Attributes:
        position: `[B]` tokens seen.
        length: `[groups,B]` live slots.
        columns: by name, for each group `[B, 1 or heads, capacity]`.
    """

    def __init__(self, contract: Contract, batch: int, is_delimiter: NDArray[np.bool_]) -> None:
        groups = contract.cache.groups
        self._is_delimiter = is_delimiter
        self.position = np.zeros(batch, np.int64)
        self.length = np.zeros((len(groups), batch), np.int64)
        self._group = np.arange(len(groups))[:, None]
        # One array for all groups, as large as the largest, so that a token is counted in all of them at once; pages
        # that no group has are never touched.
        self._all: dict[str, NDArray[np.int64]] = {}
        self.columns: dict[str, list[NDArray[np.int64]]] = {}
        for column in contract.cache.slot_columns:
            sizes = [column.sizes(group, batch=batch, head_dim=contract.head_dim) for group in groups]
            whole = np.zeros((len(groups), *(max(size) for size in zip(*sizes, strict=True))), np.int64)
            self._all[column.name] = whole
            self.columns[column.name] = [
                part[:, :heads, :capacity] for part, (_, heads, capacity) in zip(whole, sizes, strict=True)
            ]
        self.chunks = [ChunkCounter() for _ in range(batch)]

    def append(self, row: int, ids: NDArray[np.int64]) -> None:
        """Counts tokens that were appended to a row, in every group."""
        offset = np.arange(len(ids))
        values = {POSITION: self.position[row] + offset, CHUNK: self.chunks[row].count(self._is_delimiter[ids])}
        slots = self.length[:, row, None] + offset
        for name, column in self._all.items():
            if name in values:
                column[self._group, row, :, slots] = values[name][None, :, None]
        self.length[:, row] += len(ids)
        self.position[row] += len(ids)

    def reset(self, rows: NDArray[np.bool_]) -> None:
        """Forgets these rows."""
        self.position[rows], self.length[:, rows] = 0, 0
        for row in np.flatnonzero(rows):
            self.chunks[row] = ChunkCounter()

"""What a session knows of its slots: how many are live in each group and row, and which token each stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.methods.layout import CHUNK, POSITION, TOKEN, TURN
from semkv_deploy.model.delimiters import ChunkCounter

if TYPE_CHECKING:
    from semkv_deploy.bundle.contract import Contract


class Slots:
    """Counters and slot columns of every row.

    Attributes:
        position: `[B]` tokens seen.
        length: `[groups,B]` live slots.
        turn: `[B]` turns that are finished, where a behaviour counts them.
        columns: by name, for each group `[B, 1 or heads, capacity]`.
    """

    def __init__(self, contract: Contract, batch: int, is_delimiter: NDArray[np.bool_]) -> None:
        groups = contract.cache.groups
        # Ids beyond the vocabulary, of Nexus rows, are no delimiters.
        self._is_delimiter = np.append(is_delimiter, False)
        self._vocabulary = len(is_delimiter)
        self.position = np.zeros(batch, np.int64)
        self.length = np.zeros((len(groups), batch), np.int64)
        self.turn = np.zeros(batch, np.int64)
        self._group = np.arange(len(groups))
        # One array for all columns and groups, as large as the largest, so that a token is counted in all of them at
        # once; pages that no group has are never touched.
        columns = contract.cache.slot_columns
        sizes = [
            [column.sizes(group, batch=batch, head_dim=contract.head_dim) for group in groups] for column in columns
        ]
        largest = [max(size) for size in zip(*(size for of_column in sizes for size in of_column), strict=True)]
        self._all = np.zeros((len(columns), len(groups), *largest), np.int64)
        self._names = [column.name for column in columns]
        self.columns: dict[str, list[NDArray[np.int64]]] = {
            column.name: [part[:, :heads, :capacity] for part, (_, heads, capacity) in zip(whole, of, strict=True)]
            for column, whole, of in zip(columns, self._all, sizes, strict=True)
        }
        self.chunks = [ChunkCounter() for _ in range(batch)]

    def append(self, row: int, ids: NDArray[np.int64], position: NDArray[np.int64] | None = None) -> None:
        """Counts tokens, or Nexus rows, that were appended to a row, in every group.

        Args:
            position: of each, where they stand for what was seen before; None: the positions that follow.
        """
        count = len(ids)
        words = np.minimum(ids, self._vocabulary)
        known = {
            POSITION: self.position[row] + np.arange(count) if position is None else position,
            CHUNK: self.chunks[row].count(self._is_delimiter[words]),
            TURN.name: 2 * self.turn[row] + (words == self._vocabulary),
            TOKEN.name: ids,
        }
        # A column of some other name starts at 0, whatever the slot held before.
        values = np.array([known.get(name, np.zeros(count, np.int64)) for name in self._names])
        length = self.length[:, row]
        if count == 1:
            self._all[:, self._group, row, :, length] = values[:, :, None].transpose(1, 0, 2)
        else:
            slots = length[:, None] + np.arange(count)
            self._all[:, self._group[:, None], row, :, slots] = values.T[None, :, :, None]
        length += count
        if position is None:
            self.position[row] += count

    def reset(self, rows: NDArray[np.bool_]) -> None:
        """Forgets these rows."""
        self.position[rows], self.length[:, rows], self.turn[rows] = 0, 0, 0
        for row in np.flatnonzero(rows):
            self.chunks[row] = ChunkCounter()

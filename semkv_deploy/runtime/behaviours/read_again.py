"""Reading again: before a compression, what was appended since the last one goes through the decoder once more."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.runtime.behaviours.base import Interpreter

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import ReadAgain
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine


class Rereader(Interpreter):
    """Interprets `ReadAgain`.

    What it changes, a reader of it may repeat: a slot's attention only rises, to what its readers give it.
    """

    def __init__(self, behaviour: ReadAgain, engine: Engine, slots: Slots) -> None:
        super().__init__()
        self.behaviour = behaviour
        self._engine, self._slots = engine, slots
        self._capacity = np.array([group.capacity for group in engine.contract.cache.groups], np.int64)
        self._unread = [np.zeros(0, np.int64) for _ in range(engine.batch)]
        self._until = np.zeros(engine.batch, np.int64)

    def begin_turn(self, rows: NDArray[np.bool_]) -> None:
        for other in self.others:
            self._read(other.finishes(rows))

    def before_append(self, count: NDArray[np.int64]) -> None:
        most = self._capacity[:, None] - self.behaviour.piece
        self._read(np.asarray((self._slots.length + count > most).any(0)))

    def appended(self, row: int, ids: NDArray[np.int64]) -> None:
        before = int(self._slots.position[row]) - len(ids)
        self._unread[row] = np.concatenate([self._unread_before(row, before), ids])
        self._until[row] = before + len(ids)

    def end_turn(self, rows: NDArray[np.bool_]) -> None:
        if self.behaviour.when == "turn":
            self._read(rows)

    def compress(self, rows: NDArray[np.bool_]) -> None:
        self._read(rows)

    def reset(self, rows: NDArray[np.bool_]) -> None:
        super().reset(rows)
        for row in np.flatnonzero(rows):
            self._unread[row], self._until[row] = np.zeros(0, np.int64), 0

    def state(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        """`unread` `[B,max context]`: -1 behind the last."""
        batch = range(*rows.indices(len(self._unread)))
        unread = np.full((len(batch), self._engine.contract.max_context), -1, np.int64)
        for number, row in enumerate(batch):
            ids = self._unread_before(row, int(self._slots.position[row]))
            unread[number, : len(ids)] = ids
        return {"unread": unread}

    def restore(self, state: dict[str, NDArray[np.int64]], rows: slice) -> None:
        for row, ids in zip(range(*rows.indices(len(self._unread))), state["unread"], strict=True):
            # A file that says otherwise was not saved by a session: what it names is not read.
            position = int(self._slots.position[row])
            known = (ids >= 0) & (ids < self._engine.contract.vocab_size) & (np.arange(len(ids)) < position)
            self._unread[row] = ids[: int(np.argmin(known)) if not known.all() else len(ids)].copy()
            self._until[row] = position

    def _unread_before(self, row: int, position: int) -> NDArray[np.int64]:
        """A row's unread tokens below a position: what a failed call appended was taken back."""
        kept: NDArray[np.int64] = self._unread[row][
            : max(0, len(self._unread[row]) - (int(self._until[row]) - position))
        ]
        return kept

    def _read(self, rows: NDArray[np.bool_]) -> None:
        started = time.perf_counter()
        for row in map(int, np.flatnonzero(rows)):
            ids = self._unread_before(row, int(self._slots.position[row]))
            if not len(ids):
                continue
            starts = range(0, len(ids), self.behaviour.piece)
            for number, start in enumerate(starts, 1):
                self._run(row, ids[start : start + self.behaviour.piece], (number, len(starts)))
            self._unread[row], self._until[row] = ids[:0], self._slots.position[row]
            self.stats.runs += 1
        self.stats.seconds += time.perf_counter() - started

    def _run(self, row: int, ids: NDArray[np.int64], recorded: tuple[int, int]) -> None:
        """Runs ids behind the row's live slots; counts nothing.

        Args:
            recorded: which run it is of how many.
        """
        slots = self._slots
        # Positions stay within the conversation's, which the model is known to take.
        position = min(int(slots.position[row]), self._engine.contract.max_context - self.behaviour.piece)
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": ids[None],
            "position_ids": position + np.arange(len(ids))[None],
            "logits_index": np.zeros((1, 1), np.int64),
            "length": slots.length[:, row : row + 1],
            self.behaviour.input: np.array(recorded, np.int64),
        }
        for other in self.others:
            feeds.update(other.step_inputs(slice(row, row + 1), len(ids)))
        self._engine.run(self.behaviour.program, feeds, row=row)

"""Isolated turns: a turn is compressed once, when it is over, and what older turns kept stays as it is.

What older turns kept are a row's first slots. To the program they are sinks, which no method touches. A run has one
number of sinks, and rows have older turns of different sizes: rows that are alike share a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.behaviours.make_room import RoomMaker

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import IsolatedTurns
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine, Feeds


class TurnIsolator(RoomMaker):
    """Interprets `IsolatedTurns`.

    Attributes:
        frozen: `[groups,B]` first slots, those of finished turns.
        pinned: `[groups,B]` of these, the first that stay whatever comes.
    """

    def __init__(self, behaviour: IsolatedTurns, engine: Engine, slots: Slots) -> None:
        super().__init__(behaviour, engine, slots)
        # Of any slots: they stay for their place, not for their score.
        self.pins = True
        self.frozen, self.pinned = np.zeros_like(slots.length), np.zeros_like(slots.length)
        self._begun = np.zeros(engine.batch, np.int64)
        self._ended = np.zeros(engine.batch, bool)
        self._sinks = np.array(behaviour.by_group["sinks"], np.int64)

    # What a session asks of every behaviour.

    def finishes(self, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return rows & self._ended

    def begin_turn(self, rows: NDArray[np.bool_]) -> None:
        rows = self.finishes(rows)
        if rows.any():
            self._finish(rows)

    def before_append(self, count: NDArray[np.int64]) -> None:
        full = self._slots.length + count > self._capacity[:, None] - self.behaviour.reserve
        if full.any():
            self._fit(full, self._slots.length - self.frozen, self.behaviour.recent_least)

    def end_turn(self, rows: NDArray[np.bool_]) -> None:
        self._ended |= rows & (self._slots.position > self._begun)
        if self.behaviour.when == "turn":
            self.begin_turn(rows)

    def compress(self, rows: NDArray[np.bool_]) -> None:
        self._ended |= rows & (self._slots.position > self._begun)
        self.begin_turn(rows)

    def pin(self, rows: NDArray[np.bool_], begun: NDArray[np.int64]) -> None:
        length, tokens = self._slots.length, self._slots.position - self._begun
        for group, keep in enumerate(self._keep):
            most, after = int(keep - keep // 2), np.where(rows, length[group], self.pinned[group])
            # A part that is gone already cannot be kept.
            gone = rows & (length[group] - self.frozen[group] < tokens)
            if gone.any() or after.max() > most:
                raise SemkvError(
                    "the capacity is too small for what is pinned",
                    where=f"budget {self._engine.contract.budget:g}, cache group {group}",
                    expected=f"at most {most} pinned slots of {self._capacity[group]}",
                    got=max(int(after.max()), int(tokens[rows].max())),
                    fix="pin less, or build with a larger --budget or --max-context",
                )
        self.pinned[:, rows] = length[:, rows]
        self._freeze(rows)

    def taken_back(self, row: int) -> None:
        length = self._slots.length[:, row]
        self._clear_dead(row)
        self._ended[row] = False
        # What was pinned, or finished whole, since the turn began is gone with it.
        self.frozen[:, row] = np.minimum(self.frozen[:, row], length)
        self.pinned[:, row] = np.minimum(self.pinned[:, row], length)
        self._begun[row] = min(self._begun[row], self._slots.position[row])

    def reset(self, rows: NDArray[np.bool_]) -> None:
        super().reset(rows)
        self.frozen[:, rows], self.pinned[:, rows], self._begun[rows], self._ended[rows] = 0, 0, 0, False

    def state(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        """`frozen`, `pinned` `[B,groups]`; `begun` `[B]`; `ended` `[B]`: whether the open turn is over."""
        return {
            "frozen": self.frozen[:, rows].T,
            "pinned": self.pinned[:, rows].T,
            "begun": self._begun[rows],
            "ended": self._ended[rows].astype(np.int64),
        }

    def restore(self, state: dict[str, NDArray[np.int64]], rows: slice) -> None:
        # A file that says otherwise was not saved by a session.
        length, position = self._slots.length[:, rows], self._slots.position[rows]
        self.frozen[:, rows] = np.clip(state["frozen"].T, 0, length)
        most = np.minimum(self.frozen[:, rows], (self._keep - self._keep // 2)[:, None])
        self.pinned[:, rows] = np.clip(state["pinned"].T, 0, most)
        self._begun[rows] = np.clip(state["begun"], 0, position)
        self._ended[rows] = (state["ended"] != 0) & (position > self._begun[rows])

    # What only this one does.

    def _finish(self, rows: NDArray[np.bool_]) -> None:
        """Fits these rows' turns to their share, once and for all."""
        tokens = self._slots.position - self._begun
        own = np.ceil(np.array(self.behaviour.turn_share)[:, None] * tokens).astype(np.int64)
        self._fit(np.broadcast_to(rows, own.shape), np.maximum(own, self.behaviour.least - self.frozen), 0)
        self._freeze(rows)

    def _freeze(self, rows: NDArray[np.bool_]) -> None:
        """What these rows hold is of finished turns from now on."""
        self.frozen[:, rows] = self._slots.length[:, rows]
        self._begun[rows], self._ended[rows] = self._slots.position[rows], False

    def _fit(self, wanted: NDArray[np.bool_], own: NDArray[np.int64], recent_least: int) -> None:
        """Compresses open turns by themselves, and older ones where both together are more than may stay.

        Args:
            wanted: `[groups,B]`: other rows are left alone.
            own: `[groups,B]` slots that the open turns may keep, as far as there is room.
            recent_least: of these, the last that are never merged, at least.
        """
        length, keep = self._slots.length, self._keep[:, None]
        # Older turns give way down to half of what may stay, and the open one beyond that.
        own = np.minimum(np.minimum(own, length - self.frozen), np.maximum(keep - self.frozen, keep // 2))
        recent = np.maximum((self.behaviour.recent_share * own).astype(np.int64), recent_least)
        sinks = np.maximum(self._sinks[:, None], self.frozen)
        self._compress_alike(wanted & (self.frozen + own < length), sinks, self.frozen + own, recent)
        before, recent = length.copy(), length - self.frozen
        sinks = np.maximum(self._sinks[:, None], self.pinned)
        self._compress_alike(wanted & (length > keep), sinks, np.broadcast_to(keep, length.shape), recent)
        self.frozen -= before - length

    def _compress_alike(
        self,
        wanted: NDArray[np.bool_],
        sinks: NDArray[np.int64],
        target: NDArray[np.int64],
        recent: NDArray[np.int64],
    ) -> None:
        """Runs the program as often as a group has rows with different `sinks`; all are `[groups,B]`."""
        wanted = wanted.copy()
        while wanted.any():
            feeds: dict[int, Feeds] = {}
            for group in map(int, np.flatnonzero(wanted.any(1))):
                least = sinks[group][wanted[group]].min()
                alike = wanted[group] & (sinks[group] == least)
                feeds[group] = {
                    **self._fixed[group],
                    "sinks": np.array(least, np.int64),
                    "target": np.where(alike, target[group], self._capacity[group]),
                    "recent": np.where(alike, recent[group], 0),
                }
                wanted[group] &= ~alike
            self._run(feeds)

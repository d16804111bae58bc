"""Nexus turns: a finished turn's tokens leave the cache, and the Nexus rows that were appended for them stay."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.layout import POSITION, TOKEN, TURN
from semkv_deploy.model.spread import rank_of, spread_order
from semkv_deploy.runtime.behaviours.group_program import GroupProgramRunner

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import NexusTurns
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine, Feeds

_PINNED = -1


class TurnKeeper(GroupProgramRunner):
    """Interprets `NexusTurns`.

    Attributes:
        kept, tokens: slots that a turn keeps from now on, as the behaviour has them.
    """

    makes_room = True
    pins = True

    def __init__(self, behaviour: NexusTurns, engine: Engine, slots: Slots) -> None:
        super().__init__(behaviour.program, engine, slots)
        self.behaviour = behaviour
        self.kept, self.tokens = behaviour.kept, behaviour.tokens
        self._rank = rank_of(behaviour.common)
        self._capacity = np.array([group.capacity for group in engine.contract.cache.groups], np.int64)
        self._begun = np.zeros(engine.batch, np.int64)
        self._ended = np.zeros(engine.batch, bool)

    # What a session asks of every behaviour.

    def begin_turn(self, rows: NDArray[np.bool_]) -> None:
        rows = rows & self._ended
        if rows.any():
            self._finish(rows)

    def due(self, row: int) -> int:
        # Rows that are spread over the turn have its positions.
        return self._sizes(row)[0] if self._ended[row] and self.behaviour.placement == "appended" else 0

    def before_append(self, count: NDArray[np.int64]) -> None:
        if (self._slots.length + count > self._capacity[:, None]).any():
            self._make_room(count)

    def end_turn(self, rows: NDArray[np.bool_]) -> None:
        self._ended |= rows & (self._slots.position > self._begun)
        if self.behaviour.when == "turn":
            self.begin_turn(rows)

    def compress(self, rows: NDArray[np.bool_]) -> None:
        self._ended |= rows & (self._slots.position > self._begun)
        self.begin_turn(rows)

    def taken_back(self, row: int) -> None:
        self._ended[row] = False
        self._begun[row] = min(self._begun[row], self._slots.position[row])

    def reset(self, rows: NDArray[np.bool_]) -> None:
        super().reset(rows)
        self._begun[rows], self._ended[rows] = 0, False

    def state(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        """`turn` `[B]`: turns finished; `begun` `[B]`: position of the open turn; `ended` `[B]`: whether it is over."""
        return {"turn": self._slots.turn[rows], "begun": self._begun[rows], "ended": self._ended[rows].astype(np.int64)}

    def restore(self, state: dict[str, NDArray[np.int64]], rows: slice) -> None:
        # A file that says otherwise was not saved by a session: no turn begins after what was seen.
        position = self._slots.position[rows]
        self._slots.turn[rows] = np.clip(state["turn"], 0, position)
        self._begun[rows] = np.clip(state["begun"], 0, position)
        self._ended[rows] = (state["ended"] != 0) & (position > self._begun[rows])

    # What only this one does.

    def pin(self, rows: NDArray[np.bool_], begun: NDArray[np.int64]) -> None:
        pinned = [self._pinned_by(rows, group) for group in range(len(self._capacity))]
        for group, keep in enumerate(self.behaviour.keep_slots):
            most, seen = int(pinned[group].sum(-1).max()), self._slots.position - self._begun
            # A part that is gone already cannot be kept.
            if most > keep or (rows & (self._own(group).sum(-1) < seen)).any():
                raise SemkvError(
                    "the capacity is too small for what is pinned",
                    where=f"budget {self._engine.contract.budget:g}, cache group {group}",
                    expected=f"at most {keep} pinned slots of {self._capacity[group]}",
                    got=max(most, int(seen[rows].max())),
                    fix="pin less, or build with a larger --budget or --max-context",
                )
        for group, column in enumerate(self._slots.columns[TURN.name]):
            column[:, 0][pinned[group]] = _PINNED
        self._begun[rows] = self._slots.position[rows]

    def _pinned_by(self, rows: NDArray[np.bool_], group: int) -> NDArray[np.bool_]:
        """`[B,C]`: live slots that are pinned once these rows' open turns are; sinks stay anyway and count."""
        turn = self._slots.columns[TURN.name][group][:, 0]
        return self._live(group) & ((rows[:, None] & self._own(group)) | (turn == _PINNED) | self._sinks(group))

    def _own(self, group: int) -> NDArray[np.bool_]:
        """`[B,C]`: live slots of each row's open turn, what is pinned of it left out."""
        own: NDArray[np.bool_] = self._slots.columns[TURN.name][group][:, 0] == 2 * self._slots.turn[:, None]
        return self._live(group) & own

    def trim(self, most: int, rows: NDArray[np.bool_]) -> None:
        """Drops the Nexus rows of finished turns behind each turn's first `most`: as if it had never had more."""
        keep = []
        for group in range(len(self._capacity)):
            turn, stays = self._slots.columns[TURN.name][group][:, 0], self._live(group)
            for row in np.flatnonzero(rows):
                for of in np.unique(turn[row][stays[row] & (turn[row] > 0) & (turn[row] % 2 == 1)]):
                    stays[row, np.flatnonzero(stays[row] & (turn[row] == of))[most:]] = False
            keep.append(stays)
        self._drop(keep)

    def _live(self, group: int) -> NDArray[np.bool_]:
        live: NDArray[np.bool_] = np.arange(self._capacity[group]) < self._slots.length[group][:, None]
        return live

    def _sinks(self, group: int) -> NDArray[np.bool_]:
        sinks: NDArray[np.bool_] = self._slots.columns[POSITION][group][:, 0] < self.behaviour.sinks
        return sinks

    def _sizes(self, row: int) -> tuple[int, int]:
        """Nexus rows of a row's turn, and how many of its last tokens stay; (0, all) where no token would go."""
        behaviour = self.behaviour
        length = int(self._slots.position[row]) - max(int(self._begun[row]), behaviour.sinks)
        slots = self.tokens or math.ceil(self.kept * length)
        share = math.ceil(behaviour.nexus_share * slots)
        return (min(share, behaviour.most), slots - share) if slots < length else (0, max(length, 0))

    def _finish(self, rows: NDArray[np.bool_]) -> None:
        """Appends the Nexus rows of these rows' turns, and drops the turns' tokens."""
        started = time.perf_counter()
        slots = self._slots
        first = np.maximum(self._begun, self.behaviour.sinks)
        end = first.copy()
        for row in map(int, np.flatnonzero(rows)):
            nexus, recent = self._sizes(row)
            if nexus:
                end[row] = slots.position[row] - recent
                self._append(row, nexus, int(first[row]), int(end[row]))
        self.stats.seconds += time.perf_counter() - started
        keep = [
            self._live(group) & ~(rows[:, None] & self._leaving(group, first, end))
            for group in range(len(self._capacity))
        ]
        self._drop(keep)
        slots.turn[rows] += 1
        self._begun[rows], self._ended[rows] = slots.position[rows], False

    def _leaving(self, group: int, first: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`[B,C]`: live slots of each row's open turn with positions from first `[B]` until before end `[B]`."""
        position = self._slots.columns[POSITION][group][:, 0]
        leaving: NDArray[np.bool_] = self._own(group) & (position >= first[:, None]) & (position < end[:, None])
        return leaving

    def _append(self, row: int, count: int, first: int, end: int) -> None:
        """Runs Nexus rows for a row's turn as a prompt of the row.

        Args:
            first, end: positions of what they are to stand for.
        """
        room = np.zeros(self._engine.batch, np.int64)
        room[row] = count
        self.before_append(room)
        slots, contract = self._slots, self._engine.contract
        ids, position = self._nexus(row, count, first, end)
        for start in range(0, len(ids), contract.prefill_chunk):
            piece = slice(start, start + contract.prefill_chunk)
            feeds = {
                **{each.name: np.zeros(int(each.shape), np.int64) for each in contract.cache.step_inputs},
                "input_ids": ids[None, piece],
                "position_ids": position[None, piece],
                "logits_index": np.array([[len(ids[piece]) - 1]]),
                "length": slots.length[:, row : row + 1],
            }
            self._engine.run(self.behaviour.decoder, feeds, row=row)
            slots.append(row, ids[piece], position[piece] if self.behaviour.placement == "spread" else None)

    def _nexus(self, row: int, count: int, first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and positions of a row's Nexus rows, `count` or, where fewer tokens are left to begin as, so many."""
        behaviour, slots = self.behaviour, self._slots
        number = min(int(slots.turn[row]), behaviour.turns - 1) * behaviour.most + np.arange(count)
        if behaviour.placement == "appended":
            return behaviour.first_id + number, slots.position[row] + np.arange(count)
        bounds = (np.full(self._engine.batch, bound) for bound in (first, end))
        body = np.flatnonzero(self._leaving(0, *bounds)[row])
        token, position = (slots.columns[name][0][row, 0, body] for name in (TOKEN.name, POSITION))
        chosen = spread_order(token.tolist(), self._rank)[:count]
        return behaviour.first_id * (1 + number[: len(chosen)]) + token[chosen], position[chosen]

    def _make_room(self, count: NDArray[np.int64]) -> None:
        """Drops finished turns, the oldest first, and then the oldest slots of the open one."""
        keep = []
        for group, capacity in enumerate(self._capacity.tolist()):
            stays = self._live(group)
            for row in np.flatnonzero(self._slots.length[group] + count > capacity):
                self._cut(stays[row], group, int(row), capacity - int(count[row]))
            keep.append(stays)
        self._drop(keep)

    def _cut(self, stays: NDArray[np.bool_], group: int, row: int, most: int) -> None:
        """Clears slots of one row, `[C]`, until `most` are left."""
        turn = self._slots.columns[TURN.name][group][row, 0]
        free = stays & (turn != _PINNED) & ~self._sinks(group)[row]
        open_turn = int(self._slots.turn[row])
        for of in np.unique(turn[free & (turn < 2 * open_turn)] // 2):
            if stays.sum() <= most:
                return
            stays[free & (turn // 2 == of)] = False
        if stays.sum() <= most:
            return
        left = min(most, self.behaviour.keep_slots[group])
        own = np.flatnonzero(free & stays)
        stays[own[: max(int(stays.sum()) - left, 0)]] = False
        if stays.sum() > most:
            raise SemkvError(
                "what is pinned leaves no room for the next append",
                where=f"row {row}, cache group {group}",
                expected=f"at most {most} slots",
                got=int(stays.sum()),
                fix="pin less, or build with a larger --budget or --max-context",
            )

    def _drop(self, keep: list[NDArray[np.bool_]]) -> None:
        """Runs the program for every group that has a slot to drop.

        Args:
            keep: by group, `[B,C]`: the slots that stay.
        """
        feeds: dict[int, Feeds] = {
            group: {"keep_index": _named(stays)}
            for group, stays in enumerate(keep)
            if (stays.sum(-1) < self._slots.length[group]).any()
        }
        if feeds:
            self._run(feeds)


def _named(keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """`keep_index` `[B,1,C]`: numbers of the slots that stay, in order, then -1."""
    index = np.full(keep.shape, -1, np.int64)
    for row, stays in enumerate(keep):
        kept = np.flatnonzero(stays)
        index[row, : len(kept)] = kept
    return index[:, None]

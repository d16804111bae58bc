"""Making room: groups without room for the next append are compressed, and at turn ends all are, where asked.

Where slots are scored by what the decoder records, a slot is pinned by a score that no recording reaches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.layout import POSITION
from semkv_deploy.model.names import SLOT_ATTENTION
from semkv_deploy.runtime.behaviours.group_program import GroupProgramRunner

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import MakeRoom
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine


PINNED = 2.0
"""The `slot_attention` of a slot that must stay: weights of attention are 1 at most."""


class RoomMaker(GroupProgramRunner):
    """Interprets `MakeRoom`."""

    makes_room = True

    def __init__(self, behaviour: MakeRoom, engine: Engine, slots: Slots) -> None:
        super().__init__(behaviour.program, engine, slots)
        self.behaviour = behaviour
        buffers = {buffer.name for buffer in engine.contract.cache.buffers}
        # Scores of blocks are means: they tell no slot from its neighbours.
        by_slot = all(each.kind != "blocks" for each in engine.contract.behaviours)
        self._scored = SLOT_ATTENTION in buffers
        self.pins = self._scored and by_slot
        self._capacity = np.array([group.capacity for group in engine.contract.cache.groups], np.int64)
        self._keep = np.array(behaviour.keep_slots, np.int64)
        self._fixed = [
            {name: _fixed_input(values[group]) for name, values in behaviour.by_group.items()}
            for group in range(len(self._keep))
        ]

    def before_append(self, count: NDArray[np.int64]) -> None:
        full = self._slots.length + count > self._capacity[:, None] - self.behaviour.reserve
        if full.any():
            self._compress(np.where(full, self._keep[:, None], self._capacity[:, None]), np.asarray(full.any(1)))

    def end_turn(self, rows: NDArray[np.bool_]) -> None:
        if self.behaviour.when == "turn":
            self.compress(rows)

    def compress(self, rows: NDArray[np.bool_]) -> None:
        share = np.array(self.behaviour.turn_share)[:, None]
        target = np.ceil(share * self._slots.position).astype(np.int64)
        target = np.clip(target, np.minimum(self.behaviour.least, self._keep)[:, None], self._keep[:, None])
        target = np.maximum(target, self._least_with_pinned())
        self._compress(np.where(rows, target, self._capacity[:, None]), np.ones(len(self._keep), bool))

    def pin(self, rows: NDArray[np.bool_], begun: NDArray[np.int64]) -> None:
        count = self._slots.position - begun
        for group, keep in enumerate(self._keep):
            after = self._with_sinks(group, self._pinned(group) | (rows[:, None, None] & self._since(group, begun)))
            gone = rows & (self._since(group, begun).sum(-1).min(-1) < count)
            # A window of what is newest stays as well.
            most = int(keep) - max(int(self.behaviour.recent_share * keep), self.behaviour.recent_least)
            if self._counts(group) and (gone.any() or after.max() > most):
                raise SemkvError(
                    "the capacity is too small for what is pinned",
                    where=f"budget {self._engine.contract.budget:g}, cache group {group}",
                    expected=f"at most {most} pinned slots of {self._capacity[group]}",
                    got=max(int(after.max()), int(count[rows].max())),
                    fix="pin less, or build with a larger --budget or --max-context",
                )
        for group in range(len(self._keep)):
            attention = np.array(self._engine.read(SLOT_ATTENTION, group))
            attention[rows[:, None, None] & self._since(group, begun)] = PINNED
            self._engine.write(SLOT_ATTENTION, group, attention)

    def taken_back(self, row: int) -> None:
        if self.pins:
            self._clear_dead(row)

    def _clear_dead(self, row: int) -> None:
        """Forgets what is said of a row's dead slots: it would be said of the next that lie there."""
        for group in range(len(self._keep) if self._scored else 0):
            attention = np.array(self._engine.read(SLOT_ATTENTION, group))
            attention[row, :, self._slots.length[group, row] :] = 0
            self._engine.write(SLOT_ATTENTION, group, attention)

    def _counts(self, group: int) -> bool:
        """Whether a group's slots are chosen by their score; in a layer with a sliding window only the oldest go."""
        return bool(self.behaviour.by_group.get("scored", (1.0,) * len(self._keep))[group])

    def _since(self, group: int, begun: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`[B,H,C]`: live slots of tokens from these positions on."""
        position = self._slots.columns[POSITION][group]
        return self._live(group) & (position >= begun[:, None, None])

    def _pinned(self, group: int) -> NDArray[np.bool_]:
        """`[B,H,C]`: live slots that are pinned."""
        return self._live(group) & (self._engine.read(SLOT_ATTENTION, group) >= PINNED)

    def _with_sinks(self, group: int, pinned: NDArray[np.bool_]) -> NDArray[np.int64]:
        """`[B]`: slots that stay whatever comes, a window aside: what is pinned, and the sinks."""
        sinks = np.arange(self._capacity[group]) < self.behaviour.by_group["sinks"][group]
        counts: NDArray[np.int64] = (pinned | (self._live(group) & sinks)).sum(-1).max(-1)
        return counts

    def _live(self, group: int) -> NDArray[np.bool_]:
        live: NDArray[np.bool_] = np.arange(self._capacity[group]) < self._slots.length[group][:, None, None]
        return live

    def _least_with_pinned(self) -> NDArray[np.int64]:
        """`[groups,B]`: slots that a compression leaves at least, so that beside its window what is pinned has room."""
        least = np.zeros(self._slots.length.shape, np.int64)
        for group, keep in enumerate(self._keep if self.pins else []):
            pinned = self._pinned(group)
            slots = self._with_sinks(group, pinned)
            needed = np.ceil(slots / (1 - self.behaviour.recent_share)).astype(np.int64) + self.behaviour.recent_least
            least[group] = np.where(pinned.any((1, 2)), np.minimum(needed, keep), 0)
        return least

    def _compress(self, target: NDArray[np.int64], wanted: NDArray[np.bool_]) -> None:
        """Runs the program.

        Args:
            target: `[groups,B]` most slots that may stay.
            wanted: `[groups]`: the others are left alone.
        """
        self._run(
            {
                int(group): {
                    **self._fixed[group],
                    "target": target[group],
                    "recent": np.maximum(
                        (self.behaviour.recent_share * target[group]).astype(np.int64), self.behaviour.recent_least
                    ),
                }
                for group in np.flatnonzero(wanted)
            }
        )


def _fixed_input(value: Any) -> NDArray[Any]:
    """An input from the contract: a list is float32 of one dimension, a number a scalar."""
    if isinstance(value, tuple):
        return np.array(value, np.float32)
    return np.array(value, np.int64 if isinstance(value, int) else np.float32)

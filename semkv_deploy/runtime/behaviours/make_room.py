"""Making room: groups without room for the next append are compressed, and at turn ends all are, where asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.runtime.behaviours.group_program import GroupProgramRunner

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import MakeRoom
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine


class RoomMaker(GroupProgramRunner):
    """Interprets `MakeRoom`."""

    makes_room = True

    def __init__(self, behaviour: MakeRoom, engine: Engine, slots: Slots) -> None:
        super().__init__(behaviour.program, engine, slots)
        self.behaviour = behaviour
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
        self._compress(np.where(rows, target, self._capacity[:, None]), np.ones(len(self._keep), bool))

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

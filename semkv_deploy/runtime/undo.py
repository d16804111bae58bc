"""What a call of a session counts, and how a call that fails is undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from semkv_deploy.model.delimiters import ChunkCounter
    from semkv_deploy.runtime.behaviours.base import Interpreter
    from semkv_deploy.runtime.slots import Slots


class Counters(NamedTuple):
    """A session's counters at one time, how often each behaviour had begun to change what stays changed, and what each
    is undone with."""

    position: NDArray[np.int64]
    length: NDArray[np.int64]
    chunks: list[ChunkCounter]
    changes: list[int]
    behaviours: list[object]


def counted(slots: Slots, behaviours: Sequence[Interpreter]) -> Counters:
    """What a call counts, before it does."""
    return Counters(
        slots.position.copy(),
        slots.length.copy(),
        [chunk.copy() for chunk in slots.chunks],
        [behaviour.changes for behaviour in behaviours],
        [behaviour.snapshot() for behaviour in behaviours],
    )


def take_back(before: Counters, slots: Slots, behaviours: Sequence[Interpreter], broken: NDArray[np.bool_]) -> None:
    """Undoes what a failed call counted: what it appended lies in dead slots then.

    What was compressed meanwhile stays so. Rows that then hold part of what was given are broken, and so are all where
    compressing itself was cut short.
    """
    if before.changes == [behaviour.changes for behaviour in behaviours]:
        slots.position[:], slots.length[:], slots.chunks[:] = before.position, before.length, before.chunks
        for behaviour, snapshot in zip(behaviours, before.behaviours, strict=True):
            behaviour.take_back(snapshot)
    elif any(behaviour.changing for behaviour in behaviours):
        broken[:] = True
    else:
        broken |= slots.position != before.position

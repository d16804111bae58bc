"""What a session asks of every behaviour, in the order of the contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from semkv_deploy.targets.engine import Feeds


@dataclass
class CompressionStats:
    """What compression did so far.

    Attributes:
        runs: how often groups were compressed (those of one time count as one).
        seconds: time spent in it, and in what has to happen before.
        levels: how many rows of a group took each level of their ladder (-1: the row was left alone).
        evicted: slots dropped because no level met the target, summed over groups and rows.
    """

    runs: int = 0
    seconds: float = 0.0
    levels: Counter[int] = field(default_factory=Counter)
    evicted: int = 0


class Interpreter:
    """Carries out one behaviour: reads and writes the session's slots, and runs programs on the engine.

    A subclass overrides what it has something to do for.

    Attributes:
        makes_room: whether an append that does not fit can be made to.
        pins: whether it can keep what must stay.
        stats: of what it did since the conversation began.
        changes: how often it began to change what cannot be changed back.
        changing: whether it has begun and not ended.
        others: the session's other interpreters.
    """

    makes_room: ClassVar[bool] = False
    pins: bool = False

    def __init__(self) -> None:
        self.stats = CompressionStats()
        self.changes, self.changing = 0, False
        self.others: Sequence[Interpreter] = ()

    def step_inputs(self, rows: slice, tokens: int) -> Feeds:
        """Decoder inputs of the behaviour's own, for a run of so many tokens in each of these rows."""
        return {}

    def finishes(self, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Of these rows, those whose turn has ended and that it compresses before they go on."""
        return np.zeros_like(rows)

    def begin_turn(self, rows: NDArray[np.bool_]) -> None:
        """Called before tokens are appended to these rows: what the end of their last turn left to be done is done."""

    def due(self, row: int) -> int:
        """Positions that `begin_turn` would take of a row."""
        return 0

    def before_append(self, count: NDArray[np.int64]) -> None:
        """Called before a run that appends `count[row]` tokens; afterwards they fit, if `makes_room`."""

    def appended(self, row: int, ids: NDArray[np.int64]) -> None:
        """Called after tokens were appended to a row."""

    def end_turn(self, rows: NDArray[np.bool_]) -> None:
        """Called when the turn of these rows ends."""

    def compress(self, rows: NDArray[np.bool_]) -> None:
        """Compresses these rows now, as at the end of a turn."""

    def pin(self, rows: NDArray[np.bool_], begun: NDArray[np.int64]) -> None:
        """Never drops what the open turn of these rows has so far, if `pins`.

        Args:
            begun: `[B]` positions at which turns began.

        Raises:
            SemkvError: when the rest of a cache would be too small to go on with; nothing is pinned then.
        """

    def taken_back(self, row: int) -> None:
        """Called after a row's turn was taken back: its last tokens are gone, and it has not ended."""

    def reset(self, rows: NDArray[np.bool_]) -> None:
        """Forgets what belongs to the conversations of these rows."""
        if rows.all():
            self.stats = CompressionStats()

    def state(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        """What a saved session must hold of these rows beyond their slots, by name."""
        return {}

    def restore(self, state: dict[str, NDArray[np.int64]], rows: slice) -> None:
        """Takes over what `state` gave."""

    def snapshot(self) -> object:
        """What a call that fails before anything changed for good is undone with."""
        return None

    def take_back(self, snapshot: object) -> None:
        """Forgets what was appended since `snapshot`; slots already have their old positions and lengths."""

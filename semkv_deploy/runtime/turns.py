"""What a session lets a caller do with turns: take one back, pin what must stay, choose how much of a turn stays."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.behaviours.isolated_turns import TurnIsolator
from semkv_deploy.runtime.behaviours.nexus_turns import TurnKeeper

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.model.delimiters import ChunkCounter
    from semkv_deploy.runtime.behaviours.base import Interpreter
    from semkv_deploy.runtime.slots import Slots


class TurnStart(NamedTuple):
    """A row's counters when its turn began."""

    position: int
    length: NDArray[np.int64]
    chunk: ChunkCounter


class Turns:
    """Turns of a session; `Session` is one."""

    slots: Slots
    behaviours: list[Interpreter]

    def __init__(self, batch: int) -> None:
        self._starts: list[TurnStart | None] = [None] * batch
        self._open = np.zeros(batch, bool)

    def _mask(self, row: int | None) -> NDArray[np.bool_]:
        raise NotImplementedError

    def _undone_if_failed(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _begin(self, rows: NDArray[np.bool_]) -> None:
        """Opens a turn in these rows, where none is open: before anything is appended."""
        new = rows & ~self._open
        if not new.any():
            return
        with self._undone_if_failed():
            for behaviour in self.behaviours:
                behaviour.begin_turn(new)
        for row in map(int, np.flatnonzero(new)):
            slots = self.slots
            self._starts[row] = TurnStart(
                int(slots.position[row]), slots.length[:, row].copy(), slots.chunks[row].copy()
            )
        self._open |= new

    def _forget_turns(self, rows: NDArray[np.bool_]) -> None:
        """Rows have another conversation: a turn of it begins with what is appended next."""
        self._open[rows] = False
        for row in np.flatnonzero(rows):
            self._starts[row] = None

    def undo_turn(self, row: int | None = None) -> None:
        """Takes back the last turn of one row or of all, ended or not: what was appended since it began.

        A turn begins with what is appended after `end_turn`, `reset` or `load`. It cannot be taken back once a part of
        it, or of what was before it, was compressed away meanwhile.

        Raises:
            SemkvError: when there is no turn to take back, or it cannot be; every row is as it was then.
        """
        rows = list(map(int, np.flatnonzero(self._mask(row))))
        slots = self.slots
        for number in rows:
            start = self._starts[number]
            if start is None:
                raise SemkvError("there is no turn to take back", where=f"row {number}", fix="append something first")
            appended = slots.position[number] - start.position
            if (slots.length[:, number] - start.length != appended).any():
                raise SemkvError(
                    "the turn cannot be taken back: something was compressed since it began",
                    where=f"row {number}",
                    fix="save the session before a turn, and load it",
                )
        for number in rows:
            start = self._starts[number]
            assert start is not None
            slots.position[number], slots.length[:, number] = start.position, start.length
            slots.chunks[number] = start.chunk.copy()
            self._starts[number], self._open[number] = None, False
            for behaviour in self.behaviours:
                behaviour.taken_back(number)

    def pin(self, row: int | None = None) -> None:
        """Never drops what the open turn has so far, in one row or in all: a system prompt, a document.

        Raises:
            SemkvError: when the method cannot, or the capacity is too small for what would be pinned.
        """
        rows, position = self._mask(row), self.slots.position
        begun = np.array(
            [at if start is None else start.position for start, at in zip(self._starts, position.tolist(), strict=True)]
        )
        for behaviour in self.behaviours:
            if behaviour.pins:
                behaviour.pin(rows, begun)
                return
        raise SemkvError(
            "the bundle's method pins nothing",
            where="session",
            expected="turns=isolated, method importance with queries=repeat, or sonic, and a budget below 1",
            fix="build with --method importance",
        )

    def keep_of_turns(self, share: float | None = None, tokens: int | None = None) -> None:
        """Chooses how many slots a turn keeps, for turns that are finished from now on.

        Args:
            share: of the turn's tokens.
            tokens: whatever its length; one of both is given.

        Raises:
            SemkvError: when the method keeps no turns, or has fewer Nexus rows than are asked for.
        """
        keeper = self._keeper()
        most = keeper.behaviour.most
        if (share is None) == (tokens is None) or not 0 < (share or 1) <= 1 or (tokens is not None and tokens < 1):
            raise SemkvError(
                "one of both is given",
                where="keep_of_turns",
                expected="a share up to 1, or 1 token or more",
                got=f"share {share}, tokens {tokens}",
            )
        if tokens is not None and np.ceil(keeper.behaviour.nexus_share * tokens) > most:
            raise SemkvError(
                "the bundle's adapter has fewer Nexus rows than are asked for",
                where="keep_of_turns",
                expected=f"at most {most}",
                got=tokens,
                fix="ask for fewer, or build with another adapter",
            )
        keeper.kept, keeper.tokens = keeper.kept if share is None else share, tokens or 0

    def trim_turns(self, tokens: int, row: int | None = None) -> None:
        """Drops the Nexus rows of finished turns behind each turn's first `tokens`, in one row or in all.

        Raises:
            SemkvError: when the method keeps no turns, or `tokens` is less than 1.
        """
        keeper = self._keeper()
        if tokens < 1:
            raise SemkvError("out of range", where="trim_turns", expected="1 or more", got=tokens)
        with self._undone_if_failed():
            keeper.trim(tokens, self._mask(row))

    @property
    def keeps_turns(self) -> bool:
        """Whether the method makes something of turns as such: `pin`, `keep_of_turns` and `trim_turns` work."""
        return any(isinstance(behaviour, TurnKeeper) for behaviour in self.behaviours)

    @property
    def finishes_turns(self) -> bool:
        """Whether a turn that was compressed is over: what is appended then begins the next one."""
        return any(isinstance(behaviour, TurnKeeper | TurnIsolator) for behaviour in self.behaviours)

    def _keeper(self) -> TurnKeeper:
        for behaviour in self.behaviours:
            if isinstance(behaviour, TurnKeeper):
                return behaviour
        raise SemkvError(
            "the bundle's method makes nothing of turns",
            where="session",
            expected="method sonic, a budget below 1",
            fix="build with --method sonic",
        )

"""A session: turns of a conversation on a cache that never outgrows its capacity.

The caller sees tokens and logits; groups, slots and compression stay inside. Positions come from the count of tokens
seen, never from how many slots are live. Everything a session must know is in its engine's contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.layout import CHUNK, DECODE, POSITION
from semkv_deploy.runtime.behaviours import interpreter
from semkv_deploy.runtime.behaviours.base import CompressionStats
from semkv_deploy.runtime.sampling import Sampler
from semkv_deploy.runtime.slots import Slots
from semkv_deploy.runtime.turns import Turns
from semkv_deploy.runtime.undo import Counters, counted, take_back
from semkv_deploy.targets.engine import RunsSomeRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.targets.engine import Engine

Tokens = Sequence[int]

_BROKEN = "an earlier call failed after part of it was appended"


class Session(Turns):
    """Many turns over one cache, for one or several batch rows.

    A call that is refused, or that fails before anything was compressed, leaves the session as it was. After a failure
    later than that the rows of the call hold part of what was given, and only `reset` is taken for them.

    Args:
        engine: holds the buffers, runs the programs, and has the contract that the session follows.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.batch)
        self.engine, self.contract = engine, engine.contract
        self.slots = Slots(self.contract, engine.batch, engine.opened.is_delimiter)
        self.behaviours = [interpreter(behaviour, engine, self.slots) for behaviour in self.contract.behaviours]
        for each in self.behaviours:
            each.others = [other for other in self.behaviours if other is not each]
        self._capacity = np.array([group.capacity for group in self.contract.cache.groups])[:, None]
        self._broken = np.zeros(engine.batch, bool)
        self._every_row = np.ones(engine.batch, bool)
        self._step_inputs = {
            each.name: np.zeros(int(each.shape), np.int64)
            for each in self.contract.cache.step_inputs
            if each.shape.isdecimal()
        }
        self._first_rows = np.zeros((engine.batch, 1), np.int64)
        self._runs_some = self.contract.batch is None and isinstance(engine, RunsSomeRows)
        self._logits = np.zeros((engine.batch, self.contract.vocab_size), np.float32)
        """Of a step of some rows; np.zeros maps pages on first touch."""

    @property
    def batch(self) -> int:
        """Rows."""
        return self.engine.batch

    @property
    def max_context(self) -> int:
        """Most tokens that a row may have."""
        return self.contract.max_context

    @property
    def position(self) -> NDArray[np.int64]:
        """`[B]` tokens seen."""
        return self.slots.position

    @property
    def length(self) -> NDArray[np.int64]:
        """`[groups,B]` live slots."""
        return self.slots.length

    @property
    def slot_position(self) -> list[NDArray[np.int64]]:
        """By group, `[B, 1 or heads, capacity]`: the position of the token in a slot."""
        return self.slots.columns[POSITION]

    @property
    def slot_chunk(self) -> list[NDArray[np.int64]]:
        """By group, `[B, 1 or heads, capacity]`: 2 x chunk number + (1 if the token is a delimiter)."""
        return self.slots.columns[CHUNK]

    @property
    def kept_slots(self) -> NDArray[np.int64]:
        """`[B]` live slots of the fullest group."""
        return self.length.max(0)

    @property
    def stats(self) -> CompressionStats:
        """What compression did since the conversation began."""
        stats = next((each.stats for each in self.behaviours if each.makes_room), CompressionStats())
        return replace(stats, seconds=sum(each.stats.seconds for each in self.behaviours))

    def reset(self, row: int | None = None) -> None:
        """Starts a new conversation in the same buffers, in one row or in all."""
        rows = self._mask(row)
        self.engine.reset(row)
        self.slots.reset(rows)
        self._forget_turns(rows)
        self._broken[rows] = False
        for behaviour in self.behaviours:
            behaviour.reset(rows)

    def prefill(self, tokens: Tokens | Sequence[Tokens], *, all_logits: bool = False) -> NDArray[np.float32]:
        """Appends a prompt (or the next turn's text) to each row.

        Args:
            tokens: ids of the one row, or a list of ids for each row; an empty list leaves its row alone.
            all_logits: return the logits of every token instead of the last (one row only).

        Returns:
            `[B,V]` logits after the last token of each row (zeros for an empty one); `[n,V]` with `all_logits`.

        Raises:
            SemkvError: for ids that are not the model's, and when a row would grow past `max_context` or past a cache
                that nothing compresses; nothing is appended then.
        """
        rows = self._rows(tokens)
        for row, ids in enumerate(rows):
            self.check_append(row, len(ids))
        if not any(len(ids) for ids in rows):
            raise SemkvError("nothing to prefill", where="prefill", expected="at least one token", got="none")
        if all_logits and len(rows) != 1:
            raise SemkvError("logits of every token are returned for one row", where="prefill", got=len(rows))
        self._begin(np.array([len(ids) > 0 for ids in rows]))
        with self._undone_if_failed():
            if all_logits:
                return np.concatenate(list(self._prefill_row(0, rows[0], every=True)))
            result = np.zeros((self.batch, self.contract.vocab_size), np.float32)
            for row, ids in enumerate(rows):
                for logits in self._prefill_row(row, ids, every=False):
                    result[row] = logits[-1]
            return result

    def step(self, tokens: Sequence[int] | NDArray[np.int64], active: NDArray[np.bool_] | None = None) -> Any:
        """Appends one token to each row.

        Args:
            tokens: `[B]` ids.
            active: `[B]`; rows that are not keep their state and need no room (their token means nothing).

        Returns:
            `[B,V]` logits, valid until the next call; those of rows that are not active mean nothing.

        Raises:
            SemkvError: as `prefill`.
        """
        ids = self._ids(tokens, "step")
        moving = self._every_row if active is None else np.asarray(active, bool)
        if ids.shape != (self.batch,) or moving.shape != (self.batch,):
            raise SemkvError("wrong number of rows", where="step", expected=self.batch, got=len(ids))
        rows: Sequence[int] = range(self.batch)
        if active is not None:
            rows = [row for row in rows if moving[row]]
            ids = np.where(moving, ids, 0)
        self._check_ids(ids, "step")
        for row in rows:
            self.check_append(row, 1)
        self._begin(moving)
        before = self._snapshot()
        try:
            self._before_append(moving.astype(np.int64))
            logits = self._step(ids[:, None], moving, idle=len(rows) < self.batch)
            for row in rows:
                self._appended(row, ids[row : row + 1])
        except BaseException:
            self._take_back(before)
            raise
        return logits

    def _step(self, ids: NDArray[np.int64], moving: NDArray[np.bool_], *, idle: bool) -> NDArray[np.float32]:
        """Runs one token in every row, or in those from the first to the last that moves, where the engine can do so.

        Where an idle row among them has no dead slot for its own, the others are run one by one.
        """
        rows = slice(0, self.batch)
        moved = np.flatnonzero(moving)
        if idle and self._runs_some and len(moved):
            rows = slice(int(moved[0]), int(moved[-1]) + 1)
        if not idle or not (self.length[:, rows][:, ~moving[rows]] >= self._capacity).any():
            logits = self._run(ids[rows], rows, None, self._first_rows[rows])[:, 0]
            if len(logits) == self.batch:
                return logits
            self._logits[rows] = logits
            return self._logits
        result = np.zeros((self.batch, self.contract.vocab_size), np.float32)
        for row in map(int, moved):
            one = slice(row, row + 1)
            result[row] = self._run(ids[one], one, row, np.zeros((1, 1), np.int64))[0, 0]
        return result

    def end_turn(self, row: int | None = None) -> None:
        """Marks the end of a turn, in one row or in all: what the method does at turn ends is done now."""
        rows = self._mask(row)
        with self._undone_if_failed():
            for behaviour in self.behaviours:
                behaviour.end_turn(rows)
        self._open[rows] = False

    def compress(self, row: int | None = None) -> None:
        """Compresses one row or all now, as at the end of a turn, whenever the bundle would do so by itself."""
        rows = self._mask(row)
        with self._undone_if_failed():
            for behaviour in self.behaviours:
                behaviour.compress(rows)
        if self.finishes_turns:
            self._open[rows] = False

    def generate(
        self,
        tokens: Tokens | Sequence[Tokens],
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        stop_ids: Sequence[int] = (),
        callback: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Prefills, then generates until a stop id, `max_new_tokens`, or the end of the row's context or cache.

        Every token returned is in the cache, so the next turn's text follows it directly. A stop id ends its row and
        is neither returned nor appended.

        Args:
            tokens: as for `prefill`.
            callback: called with (row, token id) for each token as it is chosen.

        Returns:
            New ids of each row.
        """
        sampler = sampler or Sampler()
        stops = np.array(sorted(stop_ids), np.int64)
        logits = self.prefill(tokens)
        active = np.array([len(ids) > 0 for ids in self._rows(tokens)])
        generated: list[list[int]] = [[] for _ in range(self.batch)]
        for _ in range(max_new_tokens):
            chosen = sampler(logits)
            active &= ~np.isin(chosen, stops)
            for row in map(int, np.flatnonzero(active)):
                # A row at its end ends alone: what it chose has no place.
                active[row] = self._refusal(row, 1) is None
            if not active.any():
                break
            for row in map(int, np.flatnonzero(active)):
                generated[row].append(int(chosen[row]))
                if callback:
                    callback(row, int(chosen[row]))
            logits = self.step(chosen, active)
        return generated

    def save(self, path: Path | str, row: int | None = None, note: str = "") -> None:
        """Writes the conversation of one row, or of all, to one file, with a note: see `runtime.state`.

        Raises:
            SemkvError: when the file cannot be written.
        """
        from semkv_deploy.runtime.state import save_session

        save_session(self, Path(path), row, note)

    def load(self, path: Path | str, row: int | None = None) -> None:
        """Goes on with the conversation of a saved session, in place of what one row, or all, held.

        Raises:
            SemkvError: for a file of another bundle or budget, or a damaged one; the session is as it was then.
        """
        from semkv_deploy.runtime.state import load_session

        load_session(self, Path(path), row)

    def check_rows(self, row: int | None = None) -> None:
        """Fails where a row holds part of what a failed call was given.

        Raises:
            SemkvError: naming the row.
        """
        for number in np.flatnonzero(self._mask(row) & self._broken):
            raise SemkvError(_BROKEN, where=f"row {number}", fix="reset the row, or the session")

    def _mask(self, row: int | None) -> NDArray[np.bool_]:
        if row is None:
            return np.ones(self.batch, bool)
        if not 0 <= row < self.batch:
            raise SemkvError("no such row", where="row", expected=f"0 to {self.batch - 1}", got=row)
        return np.arange(self.batch) == row

    def _rows(self, tokens: Tokens | Sequence[Tokens]) -> list[NDArray[np.int64]]:
        single = len(tokens) == 0 or np.ndim(tokens[0]) == 0
        rows = [self._ids(ids, "prefill") for ids in ([tokens] if single else tokens)]  # type: ignore[arg-type]
        if len(rows) != self.batch:
            raise SemkvError(
                "wrong number of rows", where="prefill", expected=f"{self.batch} lists of tokens", got=len(rows)
            )
        for ids in rows:
            self._check_ids(ids, "prefill")
        return rows

    def _ids(self, tokens: Sequence[int] | NDArray[Any], where: str) -> NDArray[np.int64]:
        given = np.asarray(tokens)
        if given.size and not np.issubdtype(given.dtype, np.integer):
            raise SemkvError("token ids are integers", where=where, expected="integers", got=given.dtype)
        return given.astype(np.int64)

    def _check_ids(self, ids: NDArray[np.int64], where: str) -> None:
        if ids.ndim != 1:
            raise SemkvError("token ids are one list for each row", where=where, got=f"{ids.ndim} dimensions")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.contract.vocab_size:
            bad = int(ids[(ids < 0) | (ids >= self.contract.vocab_size)][0])
            raise SemkvError(
                "no token of the model has this id",
                where=where,
                expected=f"0 to {self.contract.vocab_size - 1}",
                got=bad,
            )

    def has_room(self, row: int = 0) -> bool:
        """Whether a row takes one more token."""
        return self._refusal(row, 1) is None

    def check_append(self, row: int, count: int) -> None:
        """Fails as `prefill` does where a row does not take so many more tokens, in whatever pieces they come."""
        refusal = self._refusal(row, count)
        if refusal is not None:
            raise refusal

    def _refusal(self, row: int, count: int) -> SemkvError | None:
        """Why a row does not take `count` more tokens."""
        if not count:
            return None
        name = f"row {row}" if self.batch > 1 else "prompt"
        if self._broken[row]:
            return SemkvError(_BROKEN, where=name, fix="reset the row, or the session")
        due = sum(behaviour.due(row) for behaviour in self.behaviours)
        if self.position[row] + due + count > self.max_context:
            return SemkvError(
                f"{count} more tokens do not fit the context",
                where=name,
                expected=f"at most {self.max_context} tokens in all",
                got=f"{self.position[row] + due} + {count}",
                fix="shorten the conversation, or build with a larger --max-context",
            )
        if any(behaviour.makes_room for behaviour in self.behaviours):
            return None
        if (self.length[:, row, None] + count > self._capacity).any():
            least = int(self._capacity.min())
            return SemkvError(
                "the cache is full and the method does not compress",
                where=f"{name}, budget {self.contract.budget:g}",
                expected=f"at most {least} tokens",
                got=f"{self.kept_slots[row]} + {count}",
                fix="use a method that compresses, or a larger --max-context",
            )
        return None

    def _snapshot(self) -> Counters:
        return counted(self.slots, self.behaviours)

    def _take_back(self, before: Counters) -> None:
        take_back(before, self.slots, self.behaviours, self._broken)

    @contextmanager
    def _undone_if_failed(self) -> Iterator[None]:
        before = self._snapshot()
        try:
            yield
        except BaseException:
            self._take_back(before)
            raise

    def _prefill_row(self, row: int, ids: NDArray[np.int64], *, every: bool) -> Iterator[NDArray[np.float32]]:
        """Appends a row's tokens in pieces; yields logits `[n,V]`, of every token or of the last."""
        chunk = self.contract.prefill_chunk
        for start in range(0, len(ids), chunk):
            piece = ids[start : start + chunk]
            room = np.zeros(self.batch, np.int64)
            room[row] = len(piece)
            self._before_append(room)
            index = np.arange(len(piece)) if every else np.array([len(piece) - 1])
            logits = self._run(piece[None], slice(row, row + 1), row, index[None])[0]
            self._appended(row, piece)
            if every or start + len(piece) == len(ids):
                yield logits.copy()

    def _run(
        self, ids: NDArray[np.int64], rows: slice, row: int | None, logits_index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Logits `[n,R,V]` of tokens `[n,S]` at the rows' positions."""
        count = ids.shape[1]
        feeds = {
            **self._step_inputs,
            "input_ids": ids,
            "position_ids": self.position[rows, None] + np.arange(count),
            "logits_index": logits_index,
            "length": self.length[:, rows],
        }
        for behaviour in self.behaviours:
            feeds.update(behaviour.step_inputs(rows, count))
        if row is None and len(ids) < self.batch:
            assert isinstance(self.engine, RunsSomeRows)
            return np.asarray(self.engine.run_rows(DECODE, feeds, rows.start)["logits"])
        logits: NDArray[np.float32] = self.engine.run(DECODE, feeds, row=row)["logits"]
        return logits

    def _before_append(self, count: NDArray[np.int64]) -> None:
        for behaviour in self.behaviours:
            behaviour.before_append(count)

    def _appended(self, row: int, ids: NDArray[np.int64]) -> None:
        self.slots.append(row, ids)
        for behaviour in self.behaviours:
            behaviour.appended(row, ids)

"""One engine for many sessions: each has a row, and steps of different sessions are one run.

A round takes what came in, breaks off what was cancelled, begins turns for which there is a row, appends one piece of
one prompt, and then one token in every row that generates. A prompt therefore delays other replies by a piece a token.
Everything that touches the session happens in rounds, in one thread; callers put turns in and listen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.conversation import ChatFormat, Conversation
from semkv_deploy.runtime.reply import ReplyBuilder
from semkv_deploy.runtime.tokens import check_ids
from semkv_deploy.serve.statistics import Held, Statistics
from semkv_deploy.serve.table import Entry, OnFull, SessionTable
from semkv_deploy.serve.turn import Finished, FinishReason, Left, Listener, Piece, Request, Turn, Unavailable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.runtime.session import Session

WAIT = 0.05
"""Seconds between looks at turns that wait while nothing runs."""


class Scheduler:
    """Runs turns of many sessions over one `Session`.

    Args:
        session: its rows are what sessions share.
        tokenizer: of the bundle.
        stop_ids: the model's ends of text.
        form: for turns in messages; None: they are refused.
        on_full: see `OnFull`.
        folder: for saved sessions.
        idle_seconds: how long a session keeps its row after a turn, by its own clock.
        wait_seconds: how long a turn waits for a row; 0: it is refused at once.
        max_waiting: most turns that wait, those behind another of their session included.
        max_sessions: most sessions, saved ones included.
        clock: seconds.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        *,
        stop_ids: tuple[int, ...] = (),
        form: ChatFormat | None = None,
        on_full: OnFull = "refuse",
        folder: Path | None = None,
        idle_seconds: float = 600.0,
        wait_seconds: float = 0.0,
        max_waiting: int = 256,
        max_sessions: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session, self.tokenizer, self.form = session, tokenizer, form
        self._stop_ids, self._clock = stop_ids, clock
        self._idle_seconds, self._wait_seconds = idle_seconds, wait_seconds
        self._max_waiting, self._max_sessions = max_waiting, max_sessions
        self._table = SessionTable(session, on_full, folder)
        self.statistics = Statistics()
        self._changed = threading.Condition()
        self._inbox: list[Turn] = []
        self._to_end: list[str] = []
        self._running: dict[int, Turn] = {}
        self._waiting = 0
        self._next_prompt = 0
        self._compressed = (0, 0.0)
        self._closed = False
        self._thread: threading.Thread | None = None

    # What callers do, from any thread.

    def submit(self, session: str, request: Request, listener: Listener) -> Turn:
        """Puts a turn behind those of its session; a session that is not there begins with it.

        Args:
            listener: called in the scheduler's thread with each piece, and with `Finished` once, last of all.

        Raises:
            SemkvError: for a request that cannot be served at all.
            Unavailable: when too many turns wait, or the scheduler is closed.
        """
        if request.max_new_tokens < 1 or bool(request.ids) == bool(request.messages):
            raise SemkvError("a turn has ids or messages, and one new token or more", where="request")
        if request.messages and self.form is None:
            raise SemkvError("the tokenizer has no chat template", where="messages", fix="give ids, or text as it is")
        with self._changed:
            if self._closed:
                raise Unavailable("the server is ending", where="scheduler")
            if self._waiting + len(self._inbox) >= self._max_waiting:
                raise Unavailable("too many turns wait", where="scheduler", expected=f"at most {self._max_waiting}")
            turn = Turn(session, request, listener, self._clock())
            self._inbox.append(turn)
            self._changed.notify()
        return turn

    def end_session(self, session: str) -> None:
        """Forgets a session once its turns are done."""
        with self._changed:
            self._to_end.append(session)
            self._changed.notify()

    def held(self) -> Held:
        """What is held now."""
        return Held(
            sessions=len(self._table.entries),
            rows_used=self._table.rows_used,
            rows=self.session.batch,
            running=len(self._running),
            waiting=self._waiting + len(self._inbox),
            cache_bytes=self.session.engine.cache_bytes(),
        )

    def start(self) -> None:
        """Runs rounds in a thread until `close`."""
        self._thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Breaks off what runs and what waits, saves sessions where that was asked for, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        for turn in [*self._inbox, *(turn for entry in self._table.entries.values() for turn in entry.turns)]:
            turn.cancel()
        self._round()
        self._table.save_idle()

    def _serve(self) -> None:
        while not self._closed:
            if not self._round():
                with self._changed:
                    if not self._inbox and not self._to_end and not self._closed:
                        # Idle sessions expire, and waiting turns are given up, without a call.
                        self._changed.wait(WAIT if self._waiting else 1.0)

    # A round.

    def advance(self) -> bool:
        """Does one round, for callers without a thread; False when there was nothing to do."""
        assert self._thread is None
        return self._round()

    def _round(self) -> bool:
        self._take_in()
        self._break_off()
        self._begin_turns()
        self._table.expire(self._clock() - self._idle_seconds)
        worked = self._append_prompt() | self._append_tokens()
        self.statistics.evicted = self._table.evicted
        self._count_compressions()
        return worked

    def _take_in(self) -> None:
        with self._changed:
            turns, self._inbox = self._inbox, []
            ends, self._to_end = self._to_end, []
            # Counted before the lock is let go, so that no turn is in neither number.
            self._waiting += len(turns)
        for turn in turns:
            entry = self._table.entries.get(turn.session)
            if entry is None:
                if len(self._table.entries) >= self._max_sessions:
                    self._refuse(turn, Unavailable("too many sessions", where="scheduler", got=self._max_sessions))
                    continue
                entry = self._table.entries[turn.session] = Entry(turn.session, self._clock())
            entry.turns.append(turn)
        for name in ends:
            entry = self._table.entries.get(name)
            if entry is not None and entry.turns:
                last = entry.turns[-1]
                last.request = replace(last.request, end_session=True)
            elif entry is not None:
                self._table.forget(entry)

    def _refuse(self, turn: Turn, error: SemkvError, reason: FinishReason = "error") -> None:
        """Ends a turn that had not begun; its session is as it was."""
        self._waiting -= 1
        self._count_end(reason)
        self.statistics.refused += isinstance(error, Unavailable)
        turn.tell(Finished(reason, "undone", error=None if reason == "cancelled" else error))

    def _break_off(self) -> None:
        for entry in list(self._table.entries.values()):
            for turn in [turn for turn in entry.turns if turn.cancelled]:
                if turn is entry.turns[0] and entry.row in self._running:
                    self._finish(entry, "cancelled", self._take_back(entry, keep=True))
                else:
                    self._withdraw(entry, turn, SemkvError("cancelled"), "cancelled")

    def _withdraw(self, entry: Entry, turn: Turn, error: SemkvError, reason: FinishReason = "error") -> None:
        entry.turns.remove(turn)
        self._refuse(turn, error, reason)
        if (not entry.turns and entry.row is None and entry.saved is None) or (
            turn.request.end_session and not entry.turns
        ):
            self._table.forget(entry)

    def _begin_turns(self) -> None:
        """Begins the first turn of every session that has, or gets, a row: the longest waiting first."""
        waiting = [entry for entry in self._table.entries.values() if entry.turns and entry.row not in self._running]
        for entry in sorted(waiting, key=lambda entry: entry.turns[0].submitted):
            turn = entry.turns[0]
            try:
                if self._table.give_row(entry):
                    self._begin(entry, turn)
                elif self._clock() - turn.submitted >= self._wait_seconds:
                    busy = f"{len(self._running)} of {self.session.batch} rows generate, the others hold sessions"
                    self._withdraw(entry, turn, Unavailable("no row is free", where=f"session {entry.name}", got=busy))
            except SemkvError as error:
                self._withdraw(entry, turn, error)

    def _begin(self, entry: Entry, turn: Turn) -> None:
        row, request = entry.row, turn.request
        assert row is not None
        stop_ids = {*self._stop_ids, *request.stop_ids}
        if request.messages:
            assert self.form is not None
            if entry.conversation is None:
                entry.conversation = Conversation(self.form)
            turn.ids = entry.conversation.tokens(request.messages)
            turn.pinned = entry.conversation.pinned if self.session.keeps_turns else 0
            stop_ids.update(self.form.stop_ids)
        else:
            turn.ids = check_ids(self.tokenizer, request.ids, self.session.contract.vocab_size)
        self.session.check_append(row, len(turn.ids))
        turn.before = int(self.session.position[row])
        turn.reply = ReplyBuilder(self.tokenizer, stop_ids, request.stop)
        self._running[row] = turn
        self._waiting -= 1

    def _append_prompt(self) -> bool:
        """Appends one piece of one prompt; turns take turns."""
        rows = sorted(row for row, turn in self._running.items() if turn.appended < len(turn.ids))
        if not rows:
            return False
        row = next((row for row in rows if row >= self._next_prompt), rows[0])
        self._next_prompt = row + 1
        turn = self._running[row]
        end = turn.pinned if turn.appended < turn.pinned else len(turn.ids)
        piece = turn.ids[turn.appended : min(end, turn.appended + self.session.contract.prefill_chunk)]
        prompts: list[list[int]] = [[] for _ in range(self.session.batch)]
        prompts[row] = piece
        try:
            logits = self.session.prefill(prompts)
            turn.appended += len(piece)
            self.statistics.prompt_tokens += len(piece)
            if turn.appended == turn.pinned:
                self.session.pin(row)
            if turn.appended == len(turn.ids):
                self._choose(row, logits[row : row + 1])
        except Exception as error:
            self._fail(row, error)
        return True

    def _append_tokens(self) -> bool:
        """Appends one token in every row that has chosen one, in one run, and chooses the next."""
        chosen = {row: turn.pending for row, turn in self._running.items() if turn.pending is not None}
        if not chosen:
            return False
        rows = list(chosen)
        ids, active = np.zeros(self.session.batch, np.int64), np.zeros(self.session.batch, bool)
        for row, token in chosen.items():
            ids[row], active[row] = token, True
        try:
            logits = self.session.step(ids, active)
        except Exception as error:
            # Which row made it fail is not known: none of them has its token.
            for row in rows:
                self._fail(row, error)
            return True
        for row in rows:
            turn = self._running[row]
            turn.reply.appended()
            turn.pending = None
            try:
                if turn.generated == turn.request.max_new_tokens:
                    self._end(row, "length")
                else:
                    self._choose(row, logits[row : row + 1])
            except Exception as error:
                self._fail(row, error)
        return True

    def _choose(self, row: int, logits: NDArray[np.float32]) -> None:
        turn = self._running[row]
        token = int(turn.request.sampler(logits)[0])
        if turn.reply.ends(token):
            self._end(row, "stop")
        elif not self.session.has_room(row):
            self._end(row, "length")
        else:
            self._count_token(turn)
            turn.tell(Piece((token,), turn.reply.push(token)))
            if turn.reply.stopped:
                self._end(row, "stop")
            else:
                turn.pending = token

    # Ends of turns.

    def _end(self, row: int, reason: FinishReason) -> None:
        turn = self._running[row]
        entry = self._table.entries[turn.session]
        rest = turn.reply.flush()
        if rest:
            turn.tell(Piece((), rest))
        self.session.end_turn(row)
        self._record(entry, turn)
        self._finish(entry, reason, "ended")

    def _record(self, entry: Entry, turn: Turn) -> None:
        if turn.request.messages:
            assert entry.conversation is not None
            entry.conversation.record(turn.request.messages, turn.reply.reply())

    def _fail(self, row: int, error: Exception) -> None:
        entry = self._table.entries[self._running[row].session]
        known = error if isinstance(error, SemkvError) else SemkvError(f"internal {type(error).__name__}: {error}")
        self._finish(entry, "error", self._take_back(entry, keep=False), known)

    def _take_back(self, entry: Entry, *, keep: bool) -> Left:
        """Makes a session what it was before its running turn, or says what it made of it.

        Args:
            keep: where it cannot be, because something was compressed meanwhile: end a turn whose prompt is whole.
        """
        row, turn = entry.row, entry.turns[0]
        assert row is not None
        try:
            self.session.check_rows(row)
            if turn.pinned and turn.appended >= turn.pinned:
                # What is pinned is no part of the turn any more; it opened the conversation, which begins anew.
                return "dropped"
            if turn.appended:
                self.session.undo_turn(row)
            return "undone"
        except SemkvError:
            if not keep or turn.appended < len(turn.ids) or self._broken(row):
                return "dropped"
        turn.reply.flush()
        self.session.end_turn(row)
        self._record(entry, turn)
        return "kept"

    def _broken(self, row: int) -> bool:
        try:
            self.session.check_rows(row)
        except SemkvError:
            return True
        return False

    def _finish(self, entry: Entry, reason: FinishReason, left: Left, error: SemkvError | None = None) -> None:
        turn = entry.turns.popleft()
        assert entry.row is not None
        del self._running[entry.row]
        entry.used = self._clock()
        self._count_end(reason)
        # A session whose only turn was taken back has never begun: there is nothing to hold a row for.
        nothing = left == "undone" and turn.before == 0
        if left == "dropped":
            self._lose(entry)
        elif (turn.request.end_session or nothing) and not entry.turns:
            self._table.forget(entry)
        turn.tell(Finished(reason, left, turn.before + turn.appended, turn.before, turn.generated, error))

    def _lose(self, entry: Entry) -> None:
        """Forgets a session, and tells the turns that wait for it."""
        lost = SemkvError("an earlier turn failed and its session is gone", where=f"session {entry.name}")
        for turn in list(entry.turns):
            entry.turns.remove(turn)
            self._refuse(turn, lost)
        self._table.forget(entry)

    # Counting.

    def _count_end(self, reason: FinishReason) -> None:
        self.statistics.turns += 1
        self.statistics.cancelled += reason == "cancelled"
        self.statistics.failed += reason == "error"

    def _count_token(self, turn: Turn) -> None:
        now = self._clock()
        if turn.generated == 0:
            self.statistics.first_token_seconds += now - turn.submitted
            self.statistics.first_tokens += 1
        else:
            self.statistics.token_seconds += now - turn.last_token
            self.statistics.later_tokens += 1
        turn.last_token = now
        turn.generated += 1
        self.statistics.new_tokens += 1

    def _count_compressions(self) -> None:
        """Adds what was compressed since the last round; a session of one row counts anew when it is reset."""
        stats = self.session.stats
        runs, seconds = self._compressed if stats.runs >= self._compressed[0] else (0, 0.0)
        self.statistics.compressions += stats.runs - runs
        self.statistics.compress_seconds += stats.seconds - seconds
        self._compressed = (stats.runs, stats.seconds)

"""One engine for many sessions: each has a row, and steps of different sessions are one run.

A round takes what came in, breaks off what was cancelled, begins turns for which there is a row, appends one piece of
one prompt, and then one token in every row that generates. A prompt therefore delays other replies by a piece a token.
Everything that touches the session happens in rounds, in one thread; callers put turns in and listen.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.conversation import ChatFormat
from semkv_deploy.serve.running import RunningTurns
from semkv_deploy.serve.shared_table import SharedTable
from semkv_deploy.serve.statistics import Held, Statistics
from semkv_deploy.serve.table import Entry, OnFull, SessionTable
from semkv_deploy.serve.turn import (
    Clock,
    Failed,
    Finished,
    FinishReason,
    Left,
    Listener,
    Request,
    Turn,
    Unavailable,
    UnknownSession,
    as_kind,
)

if TYPE_CHECKING:
    from semkv_deploy.runtime.session import Session

WAIT, IDLE_WAIT = 0.05, 1.0
"""Seconds between looks at turns that wait, and at sessions that are idle, while nothing runs."""

_log = logging.getLogger(__name__)


class Scheduler:
    """Runs turns of many sessions over one `Session`.

    Args:
        session: its rows are what sessions share.
        tokenizer: of the bundle.
        stop_ids: the model's ends of text.
        form: for turns in messages; None: they are refused.
        on_full: see `OnFull`.
        folder: for saved sessions; those that are there are gone on with.
        share_folder: with other servers: see `SharedTable`.
        idle_seconds: how long a session keeps its row after a turn, by its own clock.
        wait_seconds: how long a turn waits for a row; 0: it is refused at once.
        max_waiting: most turns that wait, those behind another of their session included.
        max_sessions: most sessions, saved ones included.
        max_new_tokens: most tokens of a reply; None: as many as fit.

    Attributes:
        max_new_tokens: most tokens that a request may ask for.
        failure: the mistake that ended the rounds; None: there was none.
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
        share_folder: bool = False,
        idle_seconds: float = 600.0,
        wait_seconds: float = 0.0,
        max_waiting: int = 256,
        max_sessions: int = 1024,
        max_new_tokens: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.session, self.form, self.statistics = session, form, Statistics()
        self.failure: Exception | None = None
        self.max_new_tokens = min(max_new_tokens or session.max_context, session.max_context)
        self._clock, self._idle_seconds, self._wait_seconds = clock, idle_seconds, wait_seconds
        self._max_waiting = max_waiting
        common: Any = {"form": form, "most": max_sessions, "now": clock(), "statistics": self.statistics}
        self._table = (
            SharedTable(session, folder, **common)
            if share_folder and folder is not None
            else SessionTable(session, on_full, folder, **common)
        )
        self._running = RunningTurns(session, tokenizer, stop_ids, form, self.statistics, clock, self._finished)
        self._changed = threading.Condition()
        self._inbox: list[Turn | str] = []
        """Turns, and names of sessions that end, as they came."""
        self._waiting = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    # What callers do, from any thread.

    def submit(self, session: str | None, request: Request, listener: Listener) -> Turn:
        """Puts a turn behind those of its session; a session that is not there begins with it.

        Args:
            session: None: the idle one whose conversation the messages go on with, or a new one.
            listener: called in the scheduler's thread with each piece, and with `Finished` once, last of all.

        Raises:
            SemkvError: for a request that cannot be served at all.
            Unavailable: when too many turns wait, or the scheduler is closed.
        """
        request.check()
        if request.max_new_tokens > self.max_new_tokens:
            raise SemkvError(
                "more tokens than a reply may have",
                where="request",
                expected=f"at most {self.max_new_tokens}",
                got=request.max_new_tokens,
            )
        if request.messages and self.form is None:
            raise SemkvError("the tokenizer has no chat template", where="messages", fix="give ids, or text as it is")
        with self._changed:
            if self._closed or self.failure is not None:
                reason = "is ending" if self.failure is None else f"failed: {self.failure}"
                raise Unavailable(f"the server {reason}", where="scheduler")
            if self._waiting + len(self._inbox) >= self._max_waiting:
                self.statistics.count_end("error", refused=True)
                raise Unavailable("too many turns wait", where="scheduler", expected=f"at most {self._max_waiting}")
            turn = Turn(session or "", request, listener, self._clock())
            self._inbox.append(turn)
            self._changed.notify()
        return turn

    def end_session(self, session: str) -> None:
        """Forgets a session once its turns are done."""
        with self._changed:
            self._inbox.append(session)
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
        if self.failure is None:
            self._take_in()
            for turn in self._turns():
                turn.cancel()
            self._break_off()
            self._table.expire(float("inf"), self._clock())
        self._table.close()

    def _serve(self) -> None:
        try:
            while not self._closed:
                if not self._round():
                    with self._changed:
                        if not self._inbox and not self._closed:
                            # Idle sessions expire, and waiting turns are given up, without a call.
                            self._changed.wait(WAIT if self._waiting else IDLE_WAIT)
        except Exception as error:
            # A mistake of ours: nobody may wait for ever, and nobody is served by what is in an unknown state.
            _log.exception("the scheduler failed")
            with self._changed:
                self.failure = error
            self._take_in()
            self._running.fail_all(error)
            for turn in self._turns():
                turn.tell(Finished("error", "dropped", error=Unavailable(f"the server failed: {error}")))

    # A round.

    def advance(self) -> bool:
        """Does one round, for callers without a thread; False when there was nothing to do."""
        assert self._thread is None
        return self._round()

    def _round(self) -> bool:
        self._take_in()
        self._break_off()
        worked = self._begin_turns()
        now = self._clock()
        self._table.expire(now - self._idle_seconds, now)
        worked |= self._running.append_prompt() | self._running.append_tokens()
        self.statistics.count_compressions(self.session.stats)
        return worked

    def _turns(self) -> list[Turn]:
        return [turn for entry in self._table.entries.values() for turn in entry.turns]

    def _take_in(self) -> None:
        with self._changed:
            came, self._inbox = self._inbox, []
            # Counted before the lock is let go, so that no turn is in neither number.
            self._waiting += sum(isinstance(each, Turn) for each in came)
        for each in came:
            if isinstance(each, str):
                self._end_when_done(each)
                continue
            try:
                self._session_of(each).turns.append(each)
            except Unavailable as error:
                self._refuse(each, error)

    def _end_when_done(self, name: str) -> None:
        entry = self._table.known(name)
        if entry is not None and entry.turns:
            last = entry.turns[-1]
            last.request = replace(last.request, end_session=True)
        elif entry is not None:
            self._table.forget(entry)

    def _session_of(self, turn: Turn) -> Entry:
        if turn.session:
            return self._table.enter(turn.session, self._clock())
        entry = self._table.extended_by(turn.request.messages)
        if entry is None:
            entry = self._table.enter(uuid.uuid4().hex, self._clock())
        elif entry.conversation is not None:
            new = turn.request.messages[len(entry.conversation.messages) :]
            turn.request = replace(turn.request, messages=new)
        turn.session = entry.name
        return entry

    def _break_off(self) -> None:
        for entry in list(self._table.entries.values()):
            for turn in [turn for turn in entry.turns if turn.cancelled]:
                if turn is entry.turns[0] and entry in self._running:
                    self._running.break_off(entry)
                else:
                    self._withdraw(entry, turn, None)

    def _begin_turns(self) -> bool:
        """Begins the first turn of every session that has, or gets, a row: the longest waiting first.

        Returns:
            Whether one was not to be begun, so that there is another round for the next of its session.
        """
        before = self.statistics.turns
        waiting = [entry for entry in self._table.entries.values() if entry.turns and entry not in self._running]
        for entry in sorted(waiting, key=lambda entry: entry.turns[0].submitted):
            turn = entry.turns[0]
            try:
                missing = self._prepare(entry, turn)
            except (Unavailable, UnknownSession) as error:
                self._withdraw(entry, turn, error)
                continue
            except Exception as error:
                _log.warning("a saved session cannot be gone on with: %s", error)
                self._lose(entry, error)
                continue
            if missing is None:
                self._begin(entry, turn)
            elif self._clock() - turn.submitted >= self._wait_seconds:
                self._withdraw(entry, turn, missing)
        return self.statistics.turns > before

    def _prepare(self, entry: Entry, turn: Turn) -> Unavailable | None:
        """Gives a session what its next turn needs, or says what it has to wait for.

        Raises:
            Unavailable: when it is of no use to wait.
            UnknownSession: when the turn goes on with what is not there.
            SemkvError: when what was saved of the session cannot be read.
        """
        where = f"session {entry.name}"
        if not self._table.claim(entry):
            return Unavailable("another server runs a turn of the session", where=where)
        if turn.request.start:
            self._table.renew(entry)
        elif turn.request.start is False and not self._table.holds(entry):
            raise _unknown(entry)
        if self._table.give_row(entry):
            return None
        busy = f"{len(self._running)} of {self.session.batch} rows generate, the others hold sessions"
        return Unavailable("no row is free", where=where, got=busy)

    def _begin(self, entry: Entry, turn: Turn) -> None:
        try:
            self._running.begin(entry)
            self._waiting -= 1
        except SemkvError as error:
            self._withdraw(entry, turn, error)
        except Exception as error:
            self._withdraw(entry, turn, as_kind(Failed, error))

    # Ends of turns.

    def _withdraw(self, entry: Entry, turn: Turn, error: SemkvError | None) -> None:
        """Ends a turn that has not begun; a session that has no other, and never had one, was none."""
        entry.turns.remove(turn)
        if not entry.turns and (turn.request.end_session or not self._table.holds(entry)):
            self._table.forget(entry)
        self._refuse(turn, error)

    def _refuse(self, turn: Turn, error: SemkvError | None) -> None:
        """Tells a turn that had not begun that it will not; its session is as it was. None: it was cancelled."""
        self._waiting -= 1
        reason: FinishReason = "error" if error is not None else "cancelled"
        self.statistics.count_end(reason, refused=isinstance(error, Unavailable))
        turn.tell(Finished(reason, "undone", error=error))

    def _finished(self, entry: Entry, reason: FinishReason, left: Left, error: SemkvError | None) -> None:
        """Takes note of the end of a session's running turn."""
        if not entry.turns[0].request.end_session:
            left = self._table.turn_ended(entry, left)
        turn = entry.turns.popleft()
        entry.used = self._clock()
        self.statistics.count_end(reason)
        # A session whose only turn was taken back has never begun: there is nothing to hold a row for.
        nothing = left == "undone" and turn.before == 0
        if left == "dropped":
            self._lose(entry, error)
        elif (turn.request.end_session or nothing) and not entry.turns:
            self._table.forget(entry)
        elif turn.request.end_session:
            self._table.renew(entry)
        turn.tell(Finished(reason, left, turn.before + turn.appended, turn.before, turn.generated, error))

    def _lose(self, entry: Entry, why: Exception | None) -> None:
        """Forgets a session, and tells the turns that wait for it."""
        lost = Failed("the session is gone", where=f"session {entry.name}", got=why or "a turn that was broken off")
        for turn in list(entry.turns):
            entry.turns.remove(turn)
            self._refuse(turn, lost)
        self._table.forget(entry)


def _unknown(entry: Entry) -> UnknownSession:
    return UnknownSession(
        "there is no such session: it never began, has ended, or lost its row while it was idle",
        where=f"session {entry.name}",
        fix="begin it anew, with all that was said",
    )

"""The table of sessions: which has a row, which is saved, and what becomes of an idle one when its row is wanted."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.conversation import ChatFormat, Conversation
from semkv_deploy.serve.saved import SavedSessions
from semkv_deploy.serve.turn import Left, Unavailable

if TYPE_CHECKING:
    from semkv_deploy.model.template import Message
    from semkv_deploy.runtime.session import Session
    from semkv_deploy.serve.statistics import Statistics
    from semkv_deploy.serve.turn import Turn

OnFull = Literal["refuse", "forget", "save"]
"""When a session wants a row and all are taken: refuse it, or forget or save the one that is idle longest."""

_log = logging.getLogger(__name__)


@dataclass
class Entry:
    """A session.

    Attributes:
        used: when a turn of it ended last.
        row: None: it has none yet, or is saved.
        turns: the running one, then those that wait.
        saved: its file, while that is what the session is.
    """

    name: str
    used: float
    row: int | None = None
    conversation: Conversation | None = None
    turns: deque[Turn] = field(default_factory=deque)
    saved: Path | None = None

    @property
    def idle(self) -> bool:
        return not self.turns


class SessionTable:
    """Gives sessions rows of a `Session`.

    Args:
        folder: where idle sessions are saved, with `on_full="save"`; those that are there are sessions.
        form: of conversations; None: sessions have none.
        most: sessions, saved ones included.
        now: when those that are there count as used.

    Raises:
        SemkvError: when there is a folder and nothing is to be saved, or the reverse; for one that is not to be used.
    """

    def __init__(
        self,
        session: Session,
        on_full: OnFull,
        folder: Path | None,
        *,
        form: ChatFormat | None,
        most: int,
        now: float,
        statistics: Statistics,
    ) -> None:
        if (on_full == "save") != (folder is not None):
            raise SemkvError("a folder is given for saved sessions, and only for them", where="--save-sessions")
        self._session, self._on_full, self._most, self._statistics = session, on_full, most, statistics
        self._saved = SavedSessions(folder, session) if folder is not None else None
        self.entries: dict[str, Entry] = {}
        self._free = list(range(session.batch))
        for name, path, state in self._saved.found() if self._saved is not None else ():
            conversation = Conversation.restored(form, state) if state is not None and form is not None else None
            self.entries[name] = Entry(name, now, conversation=conversation, saved=path)

    @property
    def rows_used(self) -> int:
        return self._session.batch - len(self._free)

    def enter(self, name: str, now: float) -> Entry:
        """The session of that name, a new one if there is none; the one that is idle longest may have to go for it.

        Raises:
            Unavailable: when there are as many as there may be.
        """
        entry = self.entries.get(name)
        if entry is None:
            if len(self.entries) >= self._most:
                idle = self._idle(lambda entry: True)
                if self._on_full == "refuse" or not idle:
                    raise Unavailable("too many sessions", where="scheduler", expected=f"at most {self._most}")
                self.forget(idle[0])
                self._statistics.evicted += 1
            entry = self.entries[name] = Entry(name, now)
        return entry

    def known(self, name: str) -> Entry | None:
        """The session of that name, where there is one."""
        return self.entries.get(name)

    def extended_by(self, messages: Sequence[Message]) -> Entry | None:
        """The idle session whose conversation these messages go on with, the longest such; None: there is none.

        A cache cannot be rewound, so all messages of the session have to be there, replies as they were given.
        """
        found, most = None, 0
        for entry in self.entries.values():
            if entry.idle and entry.conversation is not None:
                known = entry.conversation.messages
                if most < len(known) < len(messages) and known == list(messages[: len(known)]):
                    found, most = entry, len(known)
        return found

    def give_row(self, entry: Entry) -> bool:
        """Gives a session a row, with what was saved of it; False when there is none.

        Raises:
            Unavailable: when no row is free because no idle session can be saved.
            SemkvError: when what was saved of it cannot be read; the session has to be forgotten then.
        """
        if entry.row is not None:
            return True
        if not self._free and not self._evict():
            return False
        # The lowest: a step runs the rows from the first to the last that generates.
        row = min(self._free)
        if entry.saved is None:
            self._session.reset(row)
        else:
            self._session.load(entry.saved, row)
            self._loaded(entry)
        entry.row = row
        self._free.remove(row)
        return True

    def _loaded(self, entry: Entry) -> None:
        """Takes note that a row holds what was saved: the file is older from the next turn on, and would be gone on
        with by a later server if this one died."""
        assert entry.saved is not None
        entry.saved.unlink(missing_ok=True)
        entry.saved = None

    def claim(self, entry: Entry) -> bool:
        """Takes a session for its next turn; False while another server runs one of it.

        Raises:
            SemkvError: when what was saved of it cannot be read.
        """
        return True

    def turn_ended(self, entry: Entry, left: Left) -> Left:
        """Takes note that a turn has ended, and of what it left; returns what that is after all."""
        return left

    def close(self) -> None:
        """Lets other servers have what was saved."""
        if self._saved is not None:
            self._saved.close()

    def holds(self, entry: Entry) -> bool:
        """Whether there is anything of a session, in its row or saved."""
        return entry.saved is not None or (entry.row is not None and self._session.position[entry.row] > 0)

    def renew(self, entry: Entry) -> None:
        """Makes a session what it is before its first turn; it keeps a row that it has, and turns that wait."""
        if entry.row is not None:
            self._session.reset(entry.row)
        if entry.saved is not None:
            entry.saved.unlink(missing_ok=True)
        entry.saved = entry.conversation = None

    def forget(self, entry: Entry) -> None:
        """Ends a session: its row is free, its file is gone."""
        if entry.row is not None:
            self._free.append(entry.row)
        if entry.saved is not None:
            entry.saved.unlink(missing_ok=True)
        entry.row = entry.saved = None
        self.entries.pop(entry.name, None)

    def expire(self, before: float, now: float) -> None:
        """Evicts idle sessions that have a row and were not used since; one that cannot be saved keeps it a while."""
        for entry in self._idle(lambda entry: entry.row is not None and entry.used < before):
            if self._leave(entry) is not None:
                entry.used = now

    def _evict(self) -> bool:
        if self._on_full == "refuse":
            return False
        failure = None
        for entry in self._idle(lambda entry: entry.row is not None):
            failure = self._leave(entry)
            if failure is None:
                return True
        if failure is not None:
            raise Unavailable("no row is free, and no idle session can be saved", where="scheduler", got=failure)
        return False

    def _idle(self, wanted: Callable[[Entry], bool]) -> list[Entry]:
        """Idle sessions, the one that is idle longest first."""
        return sorted((e for e in self.entries.values() if e.idle and wanted(e)), key=lambda entry: entry.used)

    def _leave(self, entry: Entry) -> Exception | None:
        """Takes an idle session's row: saved, or forgotten. Returns why it could not be saved; nothing is lost then."""
        assert entry.row is not None
        if self._saved is None:
            self.forget(entry)
        else:
            try:
                entry.saved = self._saved.save(entry.name, entry.row, entry.conversation)
            except Exception as error:
                self._statistics.not_saved += 1
                _log.warning("a session could not be saved and keeps its row: %s", error)
                return error
            self._free.append(entry.row)
            entry.row = None
        self._statistics.evicted += 1
        return None

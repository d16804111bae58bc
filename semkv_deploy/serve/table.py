"""The table of sessions: which has a row, which is saved, and what becomes of an idle one when its row is wanted."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.conversation import Conversation

if TYPE_CHECKING:
    from semkv_deploy.runtime.session import Session
    from semkv_deploy.serve.turn import Turn

OnFull = Literal["refuse", "forget", "save"]
"""When a new session wants a row and all are taken: refuse it, or forget or save the one that is idle longest."""


@dataclass
class Entry:
    """A session.

    Attributes:
        row: None: it has none yet, or is saved.
        turns: the running one, then those that wait.
        used: when a turn of it ended last.
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
        folder: where idle sessions are saved, with `on_full="save"`.
    """

    def __init__(self, session: Session, on_full: OnFull, folder: Path | None) -> None:
        if (on_full == "save") != (folder is not None):
            raise SemkvError("a folder is given for saved sessions, and only for them", where="--save-sessions")
        self._session, self._on_full, self._folder = session, on_full, folder
        self.entries: dict[str, Entry] = {}
        self._free = list(range(session.batch))
        self.evicted = 0

    @property
    def rows_used(self) -> int:
        return self._session.batch - len(self._free)

    def give_row(self, entry: Entry) -> bool:
        """Gives a session a row, with what was saved of it; False when there is none.

        Raises:
            SemkvError: when what was saved cannot be read, or another session cannot be saved; the entry has no row
                then.
        """
        if entry.row is not None:
            return True
        if not self._free and not self._evict():
            return False
        row = self._free[-1]
        if entry.saved is None:
            self._session.reset(row)
        else:
            self._session.load(entry.saved, row)
            entry.saved.unlink()
            entry.saved = None
        entry.row = self._free.pop()
        return True

    def forget(self, entry: Entry) -> None:
        """Ends a session: its row is free, its file is gone."""
        if entry.row is not None:
            self._free.append(entry.row)
        if entry.saved is not None:
            entry.saved.unlink(missing_ok=True)
        entry.row = entry.saved = None
        self.entries.pop(entry.name, None)

    def expire(self, before: float) -> None:
        """Evicts idle sessions that have a row and were not used since."""
        for entry in list(self.entries.values()):
            if entry.idle and entry.row is not None and entry.used < before:
                self._leave(entry)

    def save_idle(self) -> None:
        """Saves what can be saved, at the end."""
        if self._on_full == "save":
            self.expire(float("inf"))

    def _evict(self) -> bool:
        idle = [entry for entry in self.entries.values() if entry.idle and entry.row is not None]
        if self._on_full == "refuse" or not idle:
            return False
        self._leave(min(idle, key=lambda entry: entry.used))
        return True

    def _leave(self, entry: Entry) -> None:
        assert entry.row is not None
        self.evicted += 1
        if self._folder is None:
            self.forget(entry)
            return
        # A name may be anything a client likes; its digest is a file name.
        path = self._folder / f"{hashlib.sha256(entry.name.encode()).hexdigest()[:40]}.safetensors"
        self._session.save(path, entry.row)
        os.chmod(path, 0o600)
        entry.saved = path
        self._free.append(entry.row)
        entry.row = None

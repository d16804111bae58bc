"""Sessions that several servers share: a folder has what is true of them, and rows are copies of it.

A session's file is written at the end of each of its turns, so a server that dies takes no turn with it that was
answered. During a turn the session's lock is held, and nobody else runs one; whoever begins the next compares the file
with what it knows, and reads it where another server wrote it. So any server may get any call; one that had the last
turn of the session has less to read.

Conversations are found by their messages: after each turn a small file, named by a hash of all messages so far, names
the session.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.conversation import ChatFormat, Conversation
from semkv_deploy.serve.locks import FileLock
from semkv_deploy.serve.saved import SavedSessions, digest
from semkv_deploy.serve.table import Entry, SessionTable
from semkv_deploy.serve.turn import Left, Unavailable

if TYPE_CHECKING:
    from semkv_deploy.model.template import Message
    from semkv_deploy.runtime.session import Session
    from semkv_deploy.serve.statistics import Statistics

Stamp = tuple[int, int]
"""What tells one writing of a file from another: inode and time. A file is never written in place."""

_log = logging.getLogger(__name__)


class SharedTable(SessionTable):
    """Gives sessions of a shared folder rows of a `Session`. Arguments as `SessionTable`'s.

    Entries are those that have a row here or a turn; all others are in the folder alone.

    Raises:
        SemkvError: when the folder cannot be used, or is a server's that does not share it.
    """

    def __init__(
        self,
        session: Session,
        folder: Path,
        *,
        form: ChatFormat | None,
        most: int,
        now: float,
        statistics: Statistics,
    ) -> None:
        self._form, self._now = form, now
        self._shared = SavedSessions(folder, session, shared=True)
        self._shared.found()  # those of another bundle are refused now, not when one is wanted
        super().__init__(session, "forget", None, form=form, most=most, now=now, statistics=statistics)
        self._locks: dict[str, FileLock] = {}
        self._stamps: dict[str, Stamp] = {}
        """Of what rows hold, and of what entries without a row were found to be."""
        self._unsaved: set[str] = set()
        """Of those whose row is newer than their file because it could not be written."""
        self._names: dict[str, Path] = {}
        """Files that name sessions by their messages."""

    def enter(self, name: str, now: float) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            if not self._shared.path(name).exists() and not self._makes_place():
                raise Unavailable("too many sessions", where="scheduler", expected=f"at most {self._most}")
            entry = self.entries[name] = Entry(name, now)
        return entry

    def known(self, name: str) -> Entry | None:
        entry = self.entries.get(name) or (Entry(name, self._now) if self._shared.path(name).exists() else None)
        if entry is not None and entry.idle:
            with contextlib.suppress(SemkvError):
                self.claim(entry)
        return entry

    def _makes_place(self) -> bool:
        """Sees that there may be one more session: the one that is unused longest has to go, of whatever server."""
        files = self._shared.files()
        if len(files) < self._most:
            return True
        for path in files:
            with contextlib.suppress(SemkvError):
                name, _ = self._shared.read(path)
                entry = self.entries.get(name) or Entry(name, 0.0)
                if entry.idle and self._lock(name).take():
                    self._refresh(entry)
                    self.forget(entry)
                    self._statistics.evicted += 1
                    return True
        return False

    def extended_by(self, messages: Sequence[Message]) -> Entry | None:
        for count in range(len(messages) - 1, 0, -1):
            try:
                name = self._found_by(messages[:count]).read_text(encoding="utf-8")
            except OSError:
                continue
            entry = self.entries.get(name) or Entry(name, self._now)
            if not entry.idle:
                return None
            # Held until the turn has ended, so that the conversation is still what was looked at here.
            try:
                if not self.claim(entry):
                    return None
            except SemkvError:
                self.release(entry)
                return None
            known = entry.conversation.messages if entry.conversation is not None else []
            if 0 < len(known) < len(messages) and known == list(messages[: len(known)]):
                self.entries[name] = entry
                return entry
            self.release(entry)
        return None

    def claim(self, entry: Entry) -> bool:
        if not self._lock(entry.name).take():
            return False
        self._refresh(entry)
        return True

    def release(self, entry: Entry) -> None:
        lock = self._locks.pop(entry.name, None)
        if lock is not None:
            lock.leave(remove=True)  # of a lock that was not had nothing is removed
        if entry.row is None and entry.idle:
            self._stamps.pop(entry.name, None)
            self._names.pop(entry.name, None)
            self._unsaved.discard(entry.name)
            if self.entries.get(entry.name) is entry:
                del self.entries[entry.name]

    def turn_ended(self, entry: Entry, left: Left) -> Left:
        if left == "dropped" and self._is_saved(entry):
            # What the row holds is of no use; what was there before the turn is in the file.
            self._give_up_row(entry)
            return "undone"
        if left in ("ended", "kept"):
            self._write(entry)
        return left

    def renew(self, entry: Entry) -> None:
        self._remove(entry)
        super().renew(entry)

    def forget(self, entry: Entry) -> None:
        if self._lock(entry.name).take() and self._stamps.get(entry.name) == self._stamp(entry.name):
            self._remove(entry)
        entry.saved = None
        super().forget(entry)
        self.release(entry)

    def expire(self, before: float, now: float) -> None:
        self._now = now
        for entry in [entry for entry in self.entries.values() if entry.idle]:
            self.release(entry)
        super().expire(before, now)

    def close(self) -> None:
        for entry in list(self.entries.values()):
            self.release(entry)
        self._shared.close()

    def _loaded(self, entry: Entry) -> None:
        entry.saved = None

    def _leave(self, entry: Entry) -> Exception | None:
        if not self._is_saved(entry) and self.holds(entry):
            failure = self._write(entry) if self._lock(entry.name).take() else None
            if failure is not None:
                return failure
        self._give_up_row(entry)
        self.release(entry)
        self._statistics.evicted += 1
        return None

    def _give_up_row(self, entry: Entry) -> None:
        if entry.row is not None:
            self._free.append(entry.row)
            entry.row = None
        entry.saved = self._shared.path(entry.name) if entry.name in self._stamps else None

    def _lock(self, name: str) -> FileLock:
        if name not in self._locks:
            self._locks[name] = FileLock(self._shared.folder / f"{digest(name)}.lock")
        return self._locks[name]

    def _is_saved(self, entry: Entry) -> bool:
        return entry.name in self._stamps and entry.name not in self._unsaved

    def _stamp(self, name: str) -> Stamp | None:
        try:
            found = self._shared.path(name).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _refresh(self, entry: Entry) -> None:
        """Makes an entry what its file says, where another server wrote that, or ended the session; under the lock."""
        stamp = self._stamp(entry.name)
        if stamp == self._stamps.get(entry.name) or (stamp is None and entry.name in self._unsaved):
            return
        state = None
        self._unsaved.discard(entry.name)
        self._stamps.pop(entry.name, None)
        self._names.pop(entry.name, None)
        self._give_up_row(entry)
        entry.conversation = None
        if stamp is not None:
            self._stamps[entry.name] = stamp
            entry.saved = self._shared.path(entry.name)
            _, state = self._shared.read(entry.saved)
        if state is not None and self._form is not None:
            entry.conversation = Conversation.restored(self._form, state)
            self._names[entry.name] = self._found_by(entry.conversation.messages)

    def _write(self, entry: Entry) -> Exception | None:
        """Makes the file what the row holds, or says why not; then there is none, lest an older one be gone on with."""
        assert entry.row is not None
        try:
            self._shared.save(entry.name, entry.row, entry.conversation)
            stamp = self._stamp(entry.name)
            assert stamp is not None
            self._stamps[entry.name] = stamp
            self._unsaved.discard(entry.name)
            if entry.conversation is not None:
                older = self._names.get(entry.name)
                newer = self._names[entry.name] = self._found_by(entry.conversation.messages)
                _write_text(newer, entry.name)
                if older is not None and older != newer:
                    older.unlink(missing_ok=True)
        except Exception as error:
            self._statistics.not_saved += 1
            _log.warning("a session could not be saved, and is this server's alone: %s", error)
            # Its stamp is kept: a folder that comes back has what was there before, and the row is newer than that.
            self._unsaved.add(entry.name)
            with contextlib.suppress(OSError):
                self._unlink(entry)
            return error
        return None

    def _remove(self, entry: Entry) -> None:
        """Removes a session's files, under its lock."""
        self._stamps.pop(entry.name, None)
        self._unsaved.discard(entry.name)
        self._unlink(entry)

    def _unlink(self, entry: Entry) -> None:
        name = self._names.pop(entry.name, None)
        if name is not None:
            name.unlink(missing_ok=True)
        self._shared.path(entry.name).unlink(missing_ok=True)

    def _found_by(self, messages: Sequence[Message]) -> Path:
        """The file that names the session whose messages these are."""
        return self._shared.folder / f"{digest(json.dumps(list(messages), sort_keys=True))}.messages"


def _write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all, for its owner alone."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.touch(mode=0o600)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

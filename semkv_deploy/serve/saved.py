"""Sessions in a folder: one file each, with its name and the conversation's messages, found again by a later server."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.state import read_note
from semkv_deploy.serve.locks import FileLock

if TYPE_CHECKING:
    from semkv_deploy.runtime.conversation import Conversation
    from semkv_deploy.runtime.session import Session

SUFFIX = ".safetensors"
FOLDER_LOCK = ".servers"


class SavedSessions:
    """Saves rows of a session to a folder, which is made where there is none, for its owner alone.

    Args:
        shared: with other servers that share it; else the folder is this server's until it is closed.

    Raises:
        SemkvError: when it cannot be made, or is another server's.
    """

    def __init__(self, folder: Path, session: Session, *, shared: bool = False) -> None:
        self.folder, self._session = folder, session
        self._lock = FileLock(folder / FOLDER_LOCK, shared=shared)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            mine = self._lock.take()
        except OSError as error:
            raise SemkvError(f"cannot be made: {error.strerror}", where=folder, fix="give another folder") from None
        if not mine:
            raise SemkvError(
                "another server has its sessions there",
                where=folder,
                fix="give each server a folder, or --share-sessions to all that share one",
            )

    def close(self) -> None:
        """Lets other servers have the folder."""
        self._lock.leave()

    def path(self, name: str) -> Path:
        """A session's file, whether it is there or not."""
        return self.folder / f"{digest(name)}{SUFFIX}"

    def save(self, name: str, row: int, conversation: Conversation | None) -> Path:
        """Writes a session; returns its file.

        Raises:
            SemkvError: when it cannot be written; what was saved of it before is as it was.
        """
        path = self.path(name)
        state = None if conversation is None else conversation.state()
        self._session.save(path, row, note=json.dumps({"session": name, "conversation": state}))
        # The folder may be older than this, and open to others.
        os.chmod(path, 0o600)
        return path

    def files(self) -> list[Path]:
        """Files of sessions, the one that is unused longest first."""
        times = {}
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                times[path] = path.stat().st_mtime
            except FileNotFoundError:  # another server's, which has ended it
                continue
        return sorted(times, key=lambda path: times[path])

    def found(self) -> list[tuple[str, Path, dict[str, Any] | None]]:
        """Sessions that are there, by age: name, file, state of the conversation.

        Raises:
            SemkvError: for a file that is damaged, or of another bundle, target or budget; the folder is let go then.
        """
        try:
            return [(name, path, state) for path in self.files() for name, state in [self.read(path)]]
        except BaseException:
            self.close()
            raise

    def read(self, path: Path) -> tuple[str, dict[str, Any] | None]:
        """Name and state of the conversation of a session's file.

        Raises:
            SemkvError: as `found`.
        """
        note = read_note(self._session, path)
        try:
            read = json.loads(note)
            name, state = read["session"], read["conversation"]
        except (ValueError, KeyError, TypeError):
            name = state = None
        if not isinstance(name, str) or path.stem != digest(name):
            raise SemkvError("not a server's session", where=path, fix="give sessions a folder of their own")
        return name, state


def digest(name: str) -> str:
    """A file name for a session's, which may be anything that a client likes."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:40]

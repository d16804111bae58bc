"""Sessions in a folder: one file each, with its name and the conversation's messages, found again by a later server."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.state import read_note

if TYPE_CHECKING:
    from semkv_deploy.runtime.conversation import Conversation
    from semkv_deploy.runtime.session import Session

SUFFIX = ".safetensors"


class SavedSessions:
    """Saves rows of a session to a folder, which is made where there is none, for its owner alone.

    Raises:
        SemkvError: when it cannot be made.
    """

    def __init__(self, folder: Path, session: Session) -> None:
        self._folder, self._session = folder, session
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise SemkvError(f"cannot be made: {error.strerror}", where=folder, fix="give another folder") from None

    def save(self, name: str, row: int, conversation: Conversation | None) -> Path:
        """Writes a session; returns its file.

        Raises:
            SemkvError: when it cannot be written; what was saved of it before is as it was.
        """
        path = self._folder / f"{_digest(name)}{SUFFIX}"
        state = None if conversation is None else conversation.state()
        self._session.save(path, row, note=json.dumps({"session": name, "conversation": state}))
        # The folder may be older than this, and open to others.
        os.chmod(path, 0o600)
        return path

    def found(self) -> Iterator[tuple[str, Path, dict[str, Any] | None]]:
        """Sessions that are there, by age: name, file, state of the conversation.

        Raises:
            SemkvError: for a file that is damaged, or of another bundle, target or budget.
        """
        paths = self._folder.glob(f"*{SUFFIX}")
        for path in sorted(paths, key=lambda path: path.stat().st_mtime):
            note = read_note(self._session, path)
            try:
                read = json.loads(note)
                name, state = read["session"], read["conversation"]
            except (ValueError, KeyError, TypeError):
                name = state = None
            if not isinstance(name, str) or path.stem != _digest(name):
                raise SemkvError("not a server's session", where=path, fix="give sessions a folder of their own")
            yield name, path, state


def _digest(name: str) -> str:
    """A file name for a session's, which may be anything that a client likes."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:40]

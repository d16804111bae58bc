"""Locks of files that servers share: held by a process, let go when it ends, however it ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class FileLock:
    """A lock of one file, which is made where there is none. It works on one machine, and over NFS from version 4 on.

    Args:
        shared: others may share it; else nobody may have it.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path, self._shared = path, shared
        self._file: int | None = None

    def take(self) -> bool:
        """Takes the lock, or finds that it is taken; True where this object has it already."""
        import fcntl

        if self._file is not None:
            return True
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # Whoever had it may have removed the file since it was opened: then the lock is of no file.
            if not os.path.samestat(os.fstat(file), os.stat(self._path)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(file)
            return False
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return True

    def leave(self, *, remove: bool = False) -> None:
        """Lets the lock go.

        Args:
            remove: remove the file as well; not of a lock that is shared.
        """
        if self._file is None:
            return
        if remove:
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._file)
        self._file = None

"""A directory that appears whole or not at all, and replaces nothing but what it may replace.

Everything is written to a hidden directory beside the final path and moved there in one step. While that goes on the
path is locked, so that of two runs that write one place the second fails at once, and so that whatever a killed run
left there is known to have no owner: the next run removes it, or puts back what a half-done replacement had moved away.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import stat
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semkv_deploy.errors import SemkvError

NO_REPLACE, EXCHANGE = 1, 2
"""Flags of Linux's renameat2: fail when the new name exists; swap the two names."""

_AT_FDCWD = -100
_OTHER_PLACE = "choose another -o"

written: list[Path] = []
"""What this process has moved into place, so that who is interrupted afterwards can say what is there."""

Foreign = Callable[[Path], "str | None"]
"""Names what is in a directory that this tool did not write; None: it wrote all of it."""


@contextmanager
def new_directory(
    out: Path, *, force: bool = False, foreign: Foreign = lambda path: None, sources: Sequence[Path] = ()
) -> Iterator[Path]:
    """A directory to write to, which appears at `out` only when the block ends without an error.

    An interrupt at any moment leaves at `out` what was there, or the new directory whole, and nothing else. One that
    comes when the new directory is being moved into place comes too late: the move is finished, the interrupt dropped.

    Args:
        out: final path.
        force: replace a directory that is there; never a file, nor what a link leads to unless that is empty.
        foreign: what in a directory must not be replaced; asked before the work, again at the end, and once more when
            the directory was moved away, which is undone then.
        sources: files and directories that are read; neither they nor what holds them is replaced.

    Raises:
        SemkvError: when `out` exists and `force` is off or it may not be replaced, another run writes it, or its parent
            cannot be written to; at the end also when something appeared at `out` meanwhile.
    """
    path = _without_link(out, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SemkvError(f"cannot be written to: {error.strerror}", where=out.parent, fix=_OTHER_PLACE) from None
    # Named before anything is made: a signal in between leaves nothing either.
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    lock = _Lock(path)
    try:
        with _signals_kept() as kept:
            lock.take(out)
            _clear_dead(path)
            _check_replaceable(path, out, force, foreign, sources)
            try:
                partial.mkdir()
            except OSError as error:
                raise _cannot_write(out.parent, error) from None
        kept.deliver()
        yield partial
        with _signals_kept():
            _check_replaceable(path, out, force, foreign, sources, late=True)
            _move(partial, path, out, foreign)
            written.append(out)
    finally:
        with _signals_kept():
            shutil.rmtree(partial, ignore_errors=True)
            lock.release()


def _without_link(out: Path, force: bool) -> Path:
    """The directory that `out` leads to, so that a link stays a link; itself when it is none."""
    if not out.is_symlink():
        return out if out.name not in ("", "..") else out.resolve()
    target = out.resolve()
    if force and target.is_dir() and not any(target.iterdir()):
        return target
    raise SemkvError(
        "is a link, and what a link leads to is never replaced" if force else "already exists",
        where=out,
        got=f"a link to {target}",
        fix=f"give the path itself, or {_OTHER_PLACE}",
    )


def _cannot_write(where: Path, error: OSError) -> SemkvError:
    return SemkvError(f"cannot be written to: {error.strerror}", where=where, fix=_OTHER_PLACE)


def _appeared(out: Path) -> SemkvError:
    return SemkvError("something appeared there meanwhile, and nothing was written", where=out, fix=_OTHER_PLACE)


def _check_replaceable(
    path: Path, out: Path, force: bool, foreign: Foreign, sources: Sequence[Path], *, late: bool = False
) -> None:
    """Fails unless `path` is absent, or a directory that may be replaced."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_write(out, error) from None
    if not force and late:
        raise _appeared(out)
    if not force:
        raise SemkvError("already exists", where=out, fix="choose another -o, or give --force to replace it")
    if not stat.S_ISDIR(mode):
        raise SemkvError("is no directory, and only directories are replaced", where=out, fix=_OTHER_PLACE)
    place = path.resolve()
    for source in sources:
        if place == source.resolve() or place in source.resolve().parents:
            raise SemkvError("holds what is being read, and would be replaced", where=out, got=source, fix=_OTHER_PLACE)
    found = foreign(path)
    if found is not None:
        raise SemkvError(
            "holds more than this tool wrote, and is not replaced",
            where=out,
            got=found,
            fix=f"{_OTHER_PLACE}, or remove it",
        )


def _move(partial: Path, path: Path, out: Path, foreign: Foreign) -> None:
    """Moves `partial` to `path`; what was there is then at `partial`, or gone."""
    try:
        if not os.path.lexists(path):
            _rename_to_new(partial, path)
        elif not any(path.iterdir()):
            os.rename(partial, path)  # replaces an empty directory, and fails on any other
        elif _rename(partial, path, EXCHANGE):
            found = foreign(partial)
            if found is not None:
                _rename(partial, path, EXCHANGE)
                raise SemkvError(
                    "something was added to it meanwhile, and it is not replaced",
                    where=out,
                    got=found,
                    fix=_OTHER_PLACE,
                )
        else:
            _replace_in_two_steps(partial, path, out, foreign)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _appeared(out) from None
        raise _cannot_write(out, error) from None


def _rename_to_new(partial: Path, path: Path) -> None:
    # A plain rename replaces nothing but an empty directory; with the flag not even that.
    if not _rename(partial, path, NO_REPLACE):
        os.rename(partial, path)


def _replace_in_two_steps(partial: Path, path: Path, out: Path, foreign: Foreign) -> None:
    """For file systems that cannot swap two names: whatever happens in between, the old directory is put back."""
    old = partial.with_suffix(".replaced")
    try:
        os.rename(path, old)
        found = foreign(old)
        if found is not None:
            raise SemkvError(
                "something was added to it meanwhile, and it is not replaced", where=out, got=found, fix=_OTHER_PLACE
            )
        os.rename(partial, path)
    except BaseException:
        if old.is_dir() and not os.path.lexists(path):
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """renameat2 with a flag; False where the system or its file system has no such call.

    Raises:
        OSError: as rename.
    """
    function = _renameat2()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _renameat2() -> Any:
    """The C library's function; None where it has none (other systems, old C libraries)."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _clear_dead(path: Path) -> None:
    """Removes what killed runs left beside `path`; puts back what one had moved away and not replaced.

    The lock on `path` is held, so no living run owns any of it.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(partial|replaced)")
    for entry in sorted(path.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None:
            continue
        status = entry.lstat()
        # In a folder that others write to, a name alone says nothing.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            continue
        if match[1] == "replaced" and not os.path.lexists(path):
            os.rename(entry, path)
        else:
            shutil.rmtree(entry, ignore_errors=True)


class _Lock:
    """A lock on a path, held by the process: the system drops it when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._file = path.parent / f".{path.name}.lock"
        self._descriptor: int | None = None

    def take(self, out: Path) -> None:
        """Locks, or fails.

        Raises:
            SemkvError: when another process holds the lock, or the folder cannot be written to.
        """
        while self._descriptor is None:
            try:
                descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise _cannot_write(out.parent, error) from None
            if not _lock(descriptor):
                os.close(descriptor)
                raise SemkvError("another run is writing it", where=out, fix=f"wait for that run, or {_OTHER_PLACE}")
            # The holder removes the file before it lets go: a lock on a removed file is none.
            if _same_file(descriptor, self._file):
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def release(self) -> None:
        """Unlocks and removes the lock's file, if it is ours."""
        if self._descriptor is not None:
            self._file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks: then only the rename decides between two runs.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


class _Kept:
    """Signals that came while they were kept back."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def deliver(self) -> None:
        """Raises what the first of them stands for."""
        if self.numbers:
            raise KeyboardInterrupt


@contextmanager
def _signals_kept() -> Iterator[_Kept]:
    """Keeps back SIGINT and SIGTERM, where they would raise KeyboardInterrupt, during steps that belong together."""
    kept = _Kept()
    if threading.current_thread() is not threading.main_thread():
        yield kept  # Python raises KeyboardInterrupt in the main thread only
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    changed = [number for number, handler in before.items() if handler is signal.default_int_handler]
    try:
        for number in changed:
            signal.signal(number, lambda signum, frame: kept.numbers.append(signum))
        yield kept
    finally:
        for number in changed:
            signal.signal(number, before[number])

"""The files of a bundle: what the manifest lists, nothing else, and the bytes that are used are those that were hashed.

A name is relative, with slashes, and leads to a regular file without a link on the way. Whoever uses a file asks for it
by name and gets bytes whose SHA-256 was computed as they were read, so that a file altered after the bundle was opened
is noticed, and not run.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from semkv_deploy.bundle.own import MANIFEST, MANIFEST_LIMIT, entries
from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.external import is_inside, open_regular

if TYPE_CHECKING:
    from collections.abc import Callable

REBUILD = "build the bundle again, or copy it again from where it was built"

_BLOCK = 1 << 20


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 of one file of a bundle."""

    model_config = ConfigDict(extra="forbid")

    bytes: int = Field(ge=0, lt=1 << 50)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def read_manifest(root: Path) -> bytes:
    """Bytes of `bundle.json`.

    Raises:
        SemkvError: when it is a link, no regular file, or too large to be one.
    """
    with open_regular(root, MANIFEST) as file:
        text = file.read(MANIFEST_LIMIT + 1)
    if len(text) > MANIFEST_LIMIT:
        raise SemkvError("too large to be a manifest", where=root / MANIFEST, fix=REBUILD)
    return text


class _Mapped(mmap.mmap):
    """A mapping of a file: pages that are let go are read again when they are needed."""


def let_go(content: mmap.mmap | bytes) -> None:
    """Takes the pages of a mapped private copy out of the process's memory; the system reads them again on demand."""
    if isinstance(content, _Mapped) and hasattr(mmap, "MADV_DONTNEED"):
        content.madvise(mmap.MADV_DONTNEED)


class BundleFiles:
    """The files of one bundle.

    Args:
        root: the bundle's directory.
        records: what the manifest lists, by name.
    """

    def __init__(self, root: Path, records: Mapping[str, FileRecord]) -> None:
        self.root, self.records = root, records
        self._private: dict[str, mmap.mmap | bytes] = {}

    def check(self, *, only: Collection[str] = ()) -> None:
        """Compares the directory with the list: every file there with its size, no other, and the bytes of some.

        Args:
            only: path prefixes of the files to hash; all when empty.

        Raises:
            SemkvError: naming the file that is missing, truncated, altered, not listed, a link or no regular file.
        """
        found = dict(entries(self.root))
        for name in self.records:
            if name == MANIFEST or not is_inside(name):
                raise SemkvError(
                    "the list of files has a path outside the bundle", where=self.root / MANIFEST, got=repr(name)
                )
            if name not in found:
                raise SemkvError("file of the bundle is missing", where=self.root / name, fix=REBUILD)
        for name, status in found.items():
            if not stat.S_ISREG(status.st_mode) and (name in self.records or not name.endswith("/")):
                what = "a link" if stat.S_ISLNK(status.st_mode) else "no regular file"
                raise SemkvError(f"{what}, where a bundle has files only", where=self.root / name, fix=REBUILD)
            if name != MANIFEST and name not in self.records:
                raise self.unlisted(name)
        for name, record in self.records.items():
            self._check_size(name, found[name].st_size)
            if not only or name.startswith(tuple(only)):
                with self._open(name) as file:
                    self._check_digest(name, _digest(file), record)

    def read(self, name: str) -> bytes:
        """The file's bytes, verified.

        Raises:
            SemkvError: when it is not listed, missing, truncated or altered.
        """
        with self._open(name) as file:
            content = file.read(self.records[name].bytes + 1)
        self._check_size(name, len(content))
        self._check_digest(name, hashlib.sha256(content).hexdigest(), self.records[name])
        return content

    def private(self, name: str) -> mmap.mmap | bytes:
        """The file's bytes, verified, in a copy that nobody else can alter or truncate; one copy for all who ask.

        The copy is a file without a name in the folder for temporary files, mapped: like the original's its pages are
        read when they are needed and dropped when memory is short. It is in memory where that folder has no room, or
        is in memory itself.

        Raises:
            SemkvError: as `read`.
        """
        if name not in self._private:
            if name not in self.records:
                raise self.unlisted(name)
            record = self.records[name]
            self._private[name] = self._copy(name, record) if record.bytes else b""
        return self._private[name]

    def _copy(self, name: str, record: FileRecord) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile() as copy:
                space = os.statvfs(tempfile.gettempdir())
                if space.f_bavail * space.f_frsize > 2 * record.bytes:
                    # Written, not stored through the mapping, where a full disk would be a signal.
                    self._pour(name, record, copy.write)
                    copy.flush()
                    return _Mapped(copy.fileno(), record.bytes, access=mmap.ACCESS_READ)
        except OSError:
            pass
        memory = mmap.mmap(-1, record.bytes)
        self._pour(name, record, memory.write)
        return memory

    def _pour(self, name: str, record: FileRecord, write: Callable[[bytes], int]) -> None:
        """Writes a file's bytes with `write`, and verifies them."""
        digest = hashlib.sha256()
        with self._open(name) as file:
            self._check_size(name, os.fstat(file.fileno()).st_size)
            while block := file.read(_BLOCK):
                digest.update(block)
                write(block)
        self._check_digest(name, digest.hexdigest(), record)

    def _open(self, name: str) -> BinaryIO:
        if name not in self.records:
            raise self.unlisted(name)
        try:
            return open_regular(self.root, name)
        except FileNotFoundError:
            raise SemkvError("file of the bundle is missing", where=self.root / name, fix=REBUILD) from None

    def _check_size(self, name: str, size: int) -> None:
        if size != self.records[name].bytes:
            raise SemkvError(
                "file of the bundle is truncated or altered",
                where=self.root / name,
                expected=f"{self.records[name].bytes} bytes",
                got=f"{size} bytes",
                fix=REBUILD,
            )

    def _check_digest(self, name: str, digest: str, record: FileRecord) -> None:
        if digest != record.sha256:
            raise SemkvError(
                "file of the bundle was altered",
                where=self.root / name,
                expected=f"SHA-256 {record.sha256[:12]}…",
                got=f"{digest[:12]}…",
                fix=REBUILD,
            )

    def unlisted(self, name: str) -> SemkvError:
        """The error for a file that the manifest does not list."""
        return SemkvError(
            "not in the bundle's list of files, so nothing says what it should be",
            where=self.root / name,
            expected=f"only what {MANIFEST} lists",
            fix="remove it, or copy the bundle again from where it was built",
        )

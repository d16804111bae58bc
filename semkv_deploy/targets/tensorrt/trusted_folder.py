"""Whether a folder is the user's own: engines are native code, so whoever writes to their cache runs code here."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from semkv_deploy.errors import SemkvError


def make_private_folder(folder: Path, option: str) -> None:
    """Makes a folder that only the user can write to, where it is missing, and checks it.

    Raises:
        SemkvError: when it cannot be made, or as `check_private`.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SemkvError(
            f"cannot be a folder of engines: {error.strerror}",
            where=f"{option} {folder}",
            fix="give a folder, which is made where it is missing",
        ) from None
    check_private(folder, option)


def check_private(folder: Path, option: str) -> None:
    """Fails where others than the user and root can write to a folder, or put another in its place.

    Raises:
        SemkvError: naming the folder, or the one above it, that others can write to.
    """
    place = folder.resolve()
    for path in (place, *place.parents):
        status = path.stat()
        if status.st_uid not in (os.geteuid(), 0):
            raise _refused(option, folder, path, f"it belongs to {_name(status.st_uid)}")
        # In a sticky folder, such as /tmp, others can add files but not replace those of the user.
        if path != place and status.st_mode & stat.S_ISVTX:
            continue
        for who in _writers(path, status):
            raise _refused(option, folder, path, f"{who} can write to it")


def is_own_file(path: Path) -> bool:
    """Whether a file is a regular one of the user's or root's, which no one else can write to."""
    try:
        status = path.lstat()
    except OSError:
        return False
    mine = stat.S_ISREG(status.st_mode) and status.st_uid in (os.geteuid(), 0)
    return mine and not any(_writers(path, status))


def _writers(path: Path, status: os.stat_result) -> Iterator[str]:
    if status.st_mode & stat.S_IWOTH:
        yield "everybody"
    if status.st_mode & stat.S_IWGRP and not (_is_own_group(status.st_gid) and not _has_list(path)):
        yield "its group"


def _is_own_group(group: int) -> bool:
    """Whether a group is the one of the user's own name, with nobody else in it, as many systems make for each user."""
    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_gid == user.pw_gid and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}


def _has_list(path: Path) -> bool:
    """Whether an access-control list adds users or groups; the group's bits are then its mask."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except (OSError, AttributeError):
        return False


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def _refused(option: str, folder: Path, path: Path, why: str) -> SemkvError:
    return SemkvError(
        "others could put engines into it, which are native code",
        where=f"{option} {folder}",
        expected="a folder that only you can write to",
        got=f"{path}: {why}",
        fix=f"chmod go-w {path}, or give a folder of your own",
    )

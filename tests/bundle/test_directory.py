"""A directory that appears whole: what is never replaced, two runs at one place, interrupts, what killed runs left."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.bundle import directory, new_directory
from semkv_deploy.bundle.own import foreign
from semkv_deploy.errors import SemkvError


@pytest.fixture(params=["swapping", "two steps"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's call that swaps two names, and on a file system that has none."""
    if request.param == "two steps":
        monkeypatch.setattr(directory, "_renameat2", lambda: None)
    elif directory._renameat2() is None:
        pytest.skip("no renameat2 here")
    return str(request.param)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(out: Path, **options: Any) -> None:
    with new_directory(out, **options) as root:
        (root / "new").write_text("new")


def old_directory(out: Path) -> Path:
    out.mkdir()
    (out / "old").write_text("old")
    return out


def test_replaces_whole(renames: str, tmp_path: Path):
    write(old_directory(tmp_path / "out"), force=True)
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


def test_what_appears_during_the_work_stays(renames: str, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(SemkvError, match=r"out: something appeared there meanwhile"), new_directory(out) as root:
        (root / "new").touch()
        old_directory(out)
    assert names(tmp_path) == ["out"] and names(out) == ["old"]


def test_what_appears_just_before_the_rename_stays(renames: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between the last look and the rename: the rename itself refuses."""
    out, look = tmp_path / "out", directory._check_replaceable

    def late(*arguments: Any, **options: Any) -> None:
        look(*arguments, **options)
        if options.get("late"):
            old_directory(out)

    monkeypatch.setattr(directory, "_check_replaceable", late)
    real = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: False if path == out else real(path))
    with pytest.raises(SemkvError, match="something appeared there meanwhile"):
        write(out)
    assert names(tmp_path) == ["out"] and names(out) == ["old"]


def test_what_is_added_to_a_replaced_directory_stays(renames: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After the last look at it: the old directory is put back."""
    out, looks = old_directory(tmp_path / "out"), []

    def added_late(path: Path) -> str | None:
        looks.append(path)
        return "notes.txt" if len(looks) > 2 else None

    with pytest.raises(SemkvError, match=r"something was added to it meanwhile.*got notes\.txt"):
        write(out, force=True, foreign=added_late)
    assert names(tmp_path) == ["out"] and names(out) == ["old"]


@pytest.mark.parametrize("kind", ["file", "link to a directory", "link to a file", "dangling link", "pipe"])
def test_only_directories_are_replaced(kind: str, tmp_path: Path):
    out, target = tmp_path / "out", tmp_path / "target"
    if kind == "file":
        out.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(out)
    else:
        if kind == "link to a directory":
            old_directory(target)
        elif kind == "link to a file":
            target.write_text("mine")
        out.symlink_to(target)
    before = names(tmp_path)
    with pytest.raises(SemkvError, match=r"is no directory|is a link"):
        write(out, force=True)
    with pytest.raises(SemkvError, match="already exists"):
        write(out)
    assert names(tmp_path) == before and not (target.is_dir() and names(target) != ["old"])


def test_link_to_an_empty_directory_stays_a_link(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "disk") == ["new"]
    assert names(tmp_path) == ["disk", "out"]


@pytest.mark.parametrize("where", ["", "inside", "inside/deep/file"])
def test_what_is_read_is_not_replaced(where: str, tmp_path: Path):
    out = tmp_path / "out"
    (out / "inside/deep").mkdir(parents=True)
    (out / "inside/deep/file").touch()
    link = tmp_path / "another-way"
    link.symlink_to(out)
    with pytest.raises(SemkvError, match="holds what is being read"):
        write(out, force=True, sources=[link / where])
    assert (out / "inside/deep/file").exists() and names(tmp_path) == ["another-way", "out"]


def test_second_of_two_runs_fails_at_once_and_the_first_goes_on(tmp_path: Path):
    out = tmp_path / "out"
    with new_directory(out) as root:
        (root / "first").touch()
        for force in (False, True):
            with pytest.raises(SemkvError, match="another run is writing it"):
                write(out, force=force)
    assert names(tmp_path) == ["out"] and names(out) == ["first"]


def test_without_locks_the_rename_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the file system has no locks, and both runs began when nothing was there."""
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(directory, "_clear_dead", lambda path: None)
    out = tmp_path / "out"
    with pytest.raises(SemkvError, match="something appeared there meanwhile"), new_directory(out) as root:
        (root / "first").touch()
        write(out)
    assert names(tmp_path) == ["out"] and names(out) == ["new"]


@pytest.mark.parametrize("step", range(1, 8))
@pytest.mark.parametrize("there", [False, True])
def test_interrupt_in_any_step_leaves_old_or_new_whole(
    renames: str, step: int, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A step: a call of the system that makes, moves or removes something. Raised before it is done."""
    out, count = tmp_path / "out", 0
    if there:
        old_directory(out)

    def interrupted(call: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                raise KeyboardInterrupt
            return call(*arguments, **options)

        return wrapper

    for module, name in ((os, "rename"), (Path, "mkdir"), (directory, "_rename"), (directory, "_move")):
        monkeypatch.setattr(module, name, interrupted(getattr(module, name)))
    with contextlib.suppress(KeyboardInterrupt):
        write(out, force=True)
    monkeypatch.undo()
    whole = [["new"]] + ([["old"]] if there else [])
    assert (not there and not out.exists()) or names(out) in whole
    assert names(tmp_path) in (["out"], [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_the_directory_is_moved_comes_too_late(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, move = old_directory(tmp_path / "out"), directory._move
    before = signal.signal(number, signal.default_int_handler)

    def moving(*arguments: Any) -> None:
        os.kill(os.getpid(), number)
        move(*arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(directory, "_move", moving)
    try:
        write(out, force=True)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert names(tmp_path) == ["out"] and names(out) == ["new"]


def killed(out: Path, code: str) -> None:
    """A process that kills itself while it writes `out`."""
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom semkv_deploy.bundle import directory, new_directory\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{code}\n"
        "with new_directory(Path(sys.argv[1]), force=True) as root:\n"
        "    (root / 'half').write_text('half')\n"
        "    if where == 'working': die()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_next_run_removes_what_a_killed_one_left(tmp_path: Path):
    out = tmp_path / "out"
    killed(out, "where = 'working'")
    assert not out.exists() and len(names(tmp_path)) == 2
    write(out)
    assert names(tmp_path) == ["out"] and names(out) == ["new"]


def test_next_run_puts_back_what_a_killed_one_had_moved_away(tmp_path: Path):
    """On a file system that cannot swap two names, killed between the two renames."""
    out = old_directory(tmp_path / "out")
    code = (
        "where = 'moving'\ndirectory._renameat2 = lambda: None\nreal, count = os.rename, []\n"
        "def rename(*a):\n    count.append(a)\n    die() if len(count) == 2 else real(*a)\nos.rename = rename"
    )
    killed(out, code)
    assert not out.exists()
    with pytest.raises(SemkvError, match="already exists"):
        write(out)
    assert names(tmp_path) == ["out"] and names(out) == ["old"]
    write(out, force=True)
    assert names(tmp_path) == ["out"] and names(out) == ["new"]


def test_what_only_looks_like_a_left_over_stays(tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target/file").touch()
    (tmp_path / ".out.01234567.partial").symlink_to(tmp_path / "target")
    (tmp_path / ".out.89abcdef.replaced").write_text("a file")
    (tmp_path / ".other.01234567.partial").mkdir()
    (tmp_path / ".out.mine.partial").mkdir()
    before = names(tmp_path)
    write(tmp_path / "out")
    assert names(tmp_path) == sorted([*before, "out"]) and (tmp_path / "target/file").exists()


def test_what_is_written_has_the_users_mode(tmp_path: Path):
    before = os.umask(0o077)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_a_bundle_and_an_export_are_this_tools_own(tiny_bundle: Path, tiny_export: Path, tmp_path: Path):
    assert foreign(tiny_bundle) is None and foreign(tiny_export) is None
    (tmp_path / "empty").mkdir()
    assert foreign(tmp_path / "empty") is None


@pytest.mark.parametrize("fixture", ["tiny_bundle", "tiny_export"])
@pytest.mark.parametrize("added", ["notes.txt", "tokenizer/notes.txt", "onnx/more/x.bin", "empty/"])
def test_with_something_else_in_it_it_is_not(fixture: str, added: str, tmp_path: Path, request: pytest.FixtureRequest):
    copy = Path(shutil.copytree(request.getfixturevalue(fixture), tmp_path / "copy"))
    path = copy / added
    if added.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert foreign(copy) == added


def test_a_link_in_it_is_not_its_own(tiny_export: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_export, tmp_path / "copy"))
    (copy / "compressor.onnx").unlink()
    (copy / "compressor.onnx").symlink_to("/dev/null")
    assert foreign(copy) == "compressor.onnx"


@pytest.mark.parametrize(
    "manifest",
    [
        "{}",
        "[",
        '{"schema_version": 3, "targets": {}, "files": {"thesis.doc": {}}}',
        '{"schema_version": 3, "targets": {}, "files": {"../thesis.doc": {}, "onnx/../thesis.doc": {}}}',
        '{"schema_version": 3, "targets": {}, "files": ["thesis.doc"]}',
    ],
)
def test_a_manifest_makes_nobody_elses_file_its_own(manifest: str, tmp_path: Path):
    (tmp_path / "bundle.json").write_text(manifest)
    (tmp_path / "thesis.doc").write_text("mine")
    assert foreign(tmp_path) in ("bundle.json", "thesis.doc")

"""The wheel: with native operators it is for this platform and runs them, without it is for any."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "semkv_deploy/native/libsemkv_onnxruntime.so"


def wheel(native: str, tree: Path) -> subprocess.CompletedProcess[str]:
    """Builds the wheel of a copy of the sources: setuptools leaves files where it works."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in tracked.split("\0"):
        if name.startswith(("semkv_deploy/", "scripts/")) or ("/" not in name and (ROOT / name).is_file()):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist", "."]
    return subprocess.run(command, cwd=tree, env={**os.environ, "SEMKV_NATIVE": native}, capture_output=True, text=True)


def sole(tree: Path) -> Path:
    (found,) = (tree / "dist").glob("*.whl")
    return found


def test_a_wheel_with_native_operators_runs_them_where_it_is_installed(native_library: Path, tmp_path: Path):
    done = wheel(str(native_library), tmp_path / "tree")
    assert done.returncode == 0, done.stderr
    built = sole(tmp_path / "tree")
    assert "-py3-none-linux_" in built.name
    with zipfile.ZipFile(built) as file:
        file.extractall(tmp_path / "installed")
    ask = "from semkv_deploy.targets.onnxruntime import native; print(native.LIBRARY, native.missing())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    said = subprocess.run([sys.executable, "-c", ask], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout.split() == [str(tmp_path / "installed" / LIBRARY), "None"], said.stderr


def test_it_needs_nothing_that_a_linux_of_its_age_lacks(native_library: Path, tmp_path: Path):
    """auditwheel gives it a manylinux tag; which one depends on the glibc that it is built with."""
    assert wheel(str(native_library), tmp_path).returncode == 0
    show = subprocess.run([sys.executable, "-m", "auditwheel", "show", sole(tmp_path)], capture_output=True, text=True)
    assert re.search(rf'"manylinux_2_\d+_{platform.machine()}"', show.stdout), show.stdout + show.stderr


def test_a_wheel_without_them_is_for_any_platform(tmp_path: Path):
    assert wheel("off", tmp_path).returncode == 0
    built = sole(tmp_path)
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as file:
        assert LIBRARY not in file.namelist() and "semkv_deploy/py.typed" in file.namelist()


@pytest.mark.parametrize("native, words", [("on", "cannot be built"), ("/nowhere.so", "no such library")])
def test_what_was_asked_for_and_is_not_there_is_an_error(native: str, words: str, tmp_path: Path):
    """The copy has no sources of the operators."""
    done = wheel(native, tmp_path)
    assert done.returncode != 0 and words in done.stdout + done.stderr
    assert not list(tmp_path.glob("dist/*.whl"))

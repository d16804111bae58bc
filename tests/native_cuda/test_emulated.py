"""Runs the tests in emulated/ on the CUDA kernels' own sources, on a CPU, under sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .emulated import conftest as emulated

FOLDER = Path(__file__).parent / "emulated"
ROOT = FOLDER.parents[2]


def preloads() -> str:
    """The sanitizer's runtime, and the C++ one, whose exceptions it intercepts if it is there from the start."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return " ".join(found)


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_under_sanitizers(emulated_library: Path, native_library: Path, cuda_bundles: Path, file: str) -> None:
    environment = {
        **os.environ,
        emulated.CUDA: str(emulated_library),
        emulated.CPU: str(native_library),
        emulated.BUNDLES: str(cuda_bundles),
        "LD_PRELOAD": preloads(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    # One process: the emulation has one device, whose blocks run one after the other.
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, str(FOLDER / file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    assert re.search(r"[1-9]\d* passed", done.stdout) and "skipped" not in done.stdout, done.stdout[-2000:]

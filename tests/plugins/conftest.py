"""Builds of the plugins that these tests share, made once a session in build/ (incremental, so later runs are quick).

No GPU is needed: the kernels run on the CPU (plugins/emulation), and nvcc's output is only read, not run.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
ARCHITECTURES = "80-real;90-real"


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["nice", str(ROOT / "scripts" / "build_plugins.sh"), "--jobs", "2", *arguments]
    BUILD.mkdir(exist_ok=True)
    # Tests run in several processes that share the folders: one builds, and the others find it built.
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return subprocess.run(command, capture_output=True, text=True, env=environment)


def _build(out: Path, *arguments: str) -> Path:
    done = _script("--out", str(out), *arguments)
    if "no TensorRT headers" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


@pytest.fixture(scope="session")
def emulated_kernels() -> Path:
    """libsemkv_kernels.so for the CPU, under the address and undefined-behaviour sanitizers; no TensorRT headers.

    Beside it libsemkv_onnxruntime_cuda.so, of the same objects.
    """
    out = BUILD / "plugins-emulated-kernels"
    done = _script("--out", str(out), "--emulated", "--sanitize", "--kernels-only", "--onnxruntime")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out / "libsemkv_kernels.so"


@pytest.fixture(scope="session")
def harness(emulated_kernels: Path) -> Path:
    """The API harness, in the build folder of the emulated kernels so that these are compiled once."""
    options = ("--emulated", "--sanitize", "--onnxruntime", "--target", "semkv_api_harness")
    out = _build(emulated_kernels.parent, *options)
    return out / "semkv_api_harness"


@pytest.fixture(scope="session")
def cuda_build() -> Path:
    """Folder of the libraries as nvcc builds them, for sm_80 and sm_90."""
    found = _script("--print-nvcc")
    if found.returncode:
        pytest.skip(found.stderr.strip().splitlines()[-1])
    return _build(BUILD / "plugins-cuda", "--onnxruntime", "--arch", ARCHITECTURES)

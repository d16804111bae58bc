"""The native library and its check under sanitizers, built once a session in build/: later runs are quick."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"


def build(out: Path, *arguments: str) -> Path:
    command = ["nice", str(ROOT / "scripts" / "build_native.sh"), "--jobs", "2", "--out", str(out), *arguments]
    BUILD.mkdir(exist_ok=True)
    # Tests run in several processes that share the folders: one builds, and the others find it built.
    with (BUILD / "native.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


@pytest.fixture(scope="session")
def native_library() -> Path:
    """libsemkv_onnxruntime.so as users get it."""
    return build(BUILD / "native") / "libsemkv_onnxruntime.so"


@pytest.fixture(scope="module")
def installed(native_library: Path) -> Iterator[None]:
    """Builds find the library, as they do where a user has built it."""
    from semkv_deploy.targets.onnxruntime import native

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", native_library)
        yield


@pytest.fixture(scope="session")
def sanitized_check() -> Path:
    """The kernels without ONNX Runtime, under the address and undefined-behaviour sanitizers."""
    return build(BUILD / "native-sanitized", "--sanitize", "address,undefined") / "semkv_native_check"

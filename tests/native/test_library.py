"""What libsemkv_onnxruntime.so is as a file, and its kernels under sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path


def lines(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_it_needs_nothing_but_libc(native_library: Path) -> None:
    needed = [
        line.split("[")[1].rstrip("]") for line in lines("readelf", "-d", str(native_library)) if "NEEDED" in line
    ]
    allowed = ("libc.so", "libm.so", "ld-linux", "libpthread.so")
    assert needed and all(name.startswith(allowed) for name in needed), needed


def test_it_shows_its_own_functions_only(native_library: Path) -> None:
    names = {line.split()[-1] for line in lines("nm", "-D", "--defined-only", str(native_library))}
    assert names == {"RegisterCustomOps", "semkv_onnxruntime_simd", "semkv_onnxruntime_version"}


def test_the_kernels_under_sanitizers(sanitized_check: Path) -> None:
    done = subprocess.run([str(sanitized_check)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "120 cases, 0 failed" in done.stdout

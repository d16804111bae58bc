"""Native operators, built in build/ by the script that users run: later runs are quick."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

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

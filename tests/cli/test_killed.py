"""`export`, `build` and `build --force`, ended at random moments: old or new is whole, and a rerun leaves nothing more.

One moment of each; SEMKV_KILLS=30 tries so many.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.bundle.own import foreign
from semkv_deploy.model.exported import open_export

KILLS = int(os.environ.get("SEMKV_KILLS", "1"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(*words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "semkv_deploy.cli", *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def whole(out: Path) -> str | None:
    """What is at `out`, checked; None: nothing."""
    if not out.exists():
        return None
    assert foreign(out) is None
    if (out / "bundle.json").exists():
        return Bundle.open(out).manifest.method.kind
    open_export(out / "decoder.onnx")
    return "export"


@pytest.mark.parametrize("command", ["export", "build", "build --force"])
def test_ended_at_random_moments(command: str, tiny_checkpoint: Path, tiny_export: Path, tmp_path: Path):
    out = tmp_path / "out"
    if command == "export":
        words: list[object] = ["export", tiny_checkpoint, "-o", out]
    else:
        method = ["--method", "streaming-llm", "--weights", "fp32", "--budget", "0.5", "--max-context", "256"]
        words = ["build", tiny_export / "decoder.onnx", *method, "-o", out]
    force = command.endswith("--force")
    old = tiny_export if force else None
    new = "export" if command == "export" else "streaming-llm"
    started = time.perf_counter()
    assert start(*words).wait() == 0
    took = time.perf_counter() - started
    rng = random.Random(command)
    seen: set[int] = set()
    for moment in range(KILLS):
        shutil.rmtree(out)
        if old is not None:
            shutil.copytree(old, out)
        process = start(*words, *(["--force"] if force else []))
        # Most of the time is imports; what is written is written in the second half.
        delay = took * (rng.uniform(0.4, 1.02) if moment % 2 else rng.uniform(0.8, 1.02))
        time.sleep(delay)
        number = SIGNALS[(moment + len(command)) % len(SIGNALS)]
        process.send_signal(number)
        code = process.wait()
        found = whole(out)
        assert found in ({"export", new} if force else {None, new}), (delay, number)
        left = {path.name for path in tmp_path.iterdir()} - {"out"}
        assert number == signal.SIGKILL or not left, (delay, number, left)
        if found == new and code != 0 and not force:
            shutil.rmtree(out)
        if code != 0:
            seen.add(code)
            assert start(*words, *(["--force"] if force else [])).wait() == 0, (delay, number)
        assert whole(out) == new and [path.name for path in tmp_path.iterdir()] == ["out"], (delay, number)

"""`export`, `build` and `build --force`, ended at random moments: old or new is whole, and a rerun leaves nothing more.

One moment of each; SEMKV_KILLS=30 tries so many.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.bundle.own import foreign
from semkv_deploy.cli.main import main
from semkv_deploy.model.exported import open_export

KILLS = int(os.environ.get("SEMKV_KILLS", "1"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def run_command(words: Sequence[str]) -> None:
    """The command in a process of its own, made ready by the server that it is forked from."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(list(words), standalone_mode=True)


@pytest.fixture(scope="module")
def start() -> Callable[..., BaseProcess]:
    """Starts the command. The libraries are imported once: moments of what matters are left to be hit."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["semkv_deploy.compiler.pipeline", "semkv_deploy.export.decoder", __name__])

    def starting(*words: object) -> BaseProcess:
        process = context.Process(target=run_command, args=([str(word) for word in words],))
        process.start()
        return process

    return starting


def code_of(process: BaseProcess) -> int:
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


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
def test_ended_at_random_moments(
    command: str, start: Callable[..., BaseProcess], tiny_checkpoint: Path, tiny_export: Path, tmp_path: Path
):
    out = tmp_path / "out"
    if command == "export":
        words: list[object] = ["export", tiny_checkpoint, "-o", out]
    else:
        method = ["--method", "streaming-llm", "--weights", "fp32", "--budget", "0.5", "--max-context", "256"]
        words = ["build", tiny_export / "decoder.onnx", *method, "-o", out]
    force = command.endswith("--force")
    old = tiny_export if force else None
    new = "export" if command == "export" else "streaming-llm"
    assert code_of(start(*words)) == 0
    shutil.rmtree(out)
    started = time.perf_counter()
    assert code_of(start(*words)) == 0
    took = time.perf_counter() - started
    rng = random.Random(command)
    for moment in range(KILLS):
        shutil.rmtree(out)
        if old is not None:
            shutil.copytree(old, out)
        process = start(*words, *(["--force"] if force else []))
        # Half of the moments are near the end, where what was written is moved into place.
        delay = took * (rng.uniform(0.0, 1.02) if moment % 2 else rng.uniform(0.85, 1.02))
        time.sleep(delay)
        number = SIGNALS[(moment + len(command)) % len(SIGNALS)]
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        code = code_of(process)
        found = whole(out)
        assert found in ({"export", new} if force else {None, new}), (delay, number)
        left = {path.name for path in tmp_path.iterdir()} - {"out"}
        assert number == signal.SIGKILL or not left, (delay, number, left)
        if found == new and code != 0 and not force:
            shutil.rmtree(out)
        if code != 0:
            assert code_of(start(*words, *(["--force"] if force else []))) == 0, (delay, number)
        assert whole(out) == new and [path.name for path in tmp_path.iterdir()] == ["out"], (delay, number)

"""A call of libsemkv that fails leaves the session as it was, or asks for a reset: whichever run of the model fails."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .driver import onnxruntime_library


def counted(program: Path, bundle: Path) -> tuple[int, int]:
    """Failures after which the same call gave what it gives elsewhere, at once, and after a reset."""
    command = [str(program.with_name("semkv_undo")), str(bundle), onnxruntime_library()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.fullmatch(r"(\d+) undone, (\d+) reset, 0 wrong\n", done.stdout)
    assert found is not None and done.returncode == 0, done.stdout + done.stderr[-4000:]
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    "name, compresses_within",
    [
        ("semanticache", True),
        ("streaming-llm, isolated", True),
        ("importance", True),
        ("importance, at turns", False),
        ("sonic", True),
        ("dynsplit", True),
        ("dynsplit, chosen of what stays", True),
        ("dynsplit-select", False),
        ("full", False),
    ],
)
def test_every_run_fails_once(name: str, compresses_within: bool, driver: Path, bundle_of: Callable[..., Path]):
    """A prompt in pieces, and a step, of two rows. What was compressed within the call cannot be taken back."""
    undone, reset = counted(driver, bundle_of(name))
    assert undone > 1 and (reset > 0) == compresses_within


def test_nothing_is_lost_or_read_too_far(address_driver: Path, bundle_of: Callable[..., Path]):
    assert counted(address_driver, bundle_of("dynsplit"))[0] > 1

"""The script that times libsemkv beside Python's session, as docs/serving.md calls it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_both_are_timed_and_agree(driver: Path, tiny_bundle: Path):
    script = ROOT / "scripts" / "compare_runtimes.py"
    command = [sys.executable, str(script), str(tiny_bundle), "--budget", "0.25", "--context", "150"]
    done = subprocess.run([*command, "--steps", "8", "--rounds", "1"], capture_output=True, text=True)
    assert re.search(r"C\+\+ \d\.\d+ ms, Python \d\.\d+ ms a step, the same tokens\n", done.stdout), done.stderr

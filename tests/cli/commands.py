"""Commands in a process of their own, as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def cli(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "semkv_deploy.cli", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, check=False)


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code not 0, one line on standard error with these words, no traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def nothing_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == []

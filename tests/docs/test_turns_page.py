"""What the page shows of turns is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from .blocks import blocks


def test_isolated_turns_are_built_and_kept_as_shown(tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "exported").symlink_to(tiny_export)
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in blocks("turns.md", "python") if "isolated" in block]
    exec(code, {})

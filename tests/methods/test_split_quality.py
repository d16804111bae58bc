"""The command that says what splitting is worth: its numbers where they are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import split_quality


def test_blocks_of_what_is_alike_keep_what_slots_keep():
    """Attention that is one of two values by runs of eight: cut there nothing is lost, cut elsewhere something is."""
    level = np.where(np.arange(320) // 8 % 4 == 0, 0.5, 0.001)
    attention, alone = level[None], np.arange(320)
    right, wrong = alone // 8, (alone + 4) // 8
    for pool in ("mean", "mass"):
        most = split_quality.kept(attention, alone, 0.25, pool)
        assert split_quality.kept(attention, right, 0.25, pool) == pytest.approx(most)
        assert split_quality.kept(attention, wrong, 0.25, pool) < most
    assert split_quality.between(attention, right) == pytest.approx(1)
    assert split_quality.between(attention, wrong) < 0.8


def test_the_command_compares_four_ways(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = tmp_path / "text.txt"
    text.write_text("One, two; three. Four, five! Six? " * 60, encoding="utf-8")
    given = [str(tiny_export / "decoder.onnx"), "--text", f"prose={text}", "--tokens", "200", "--json"]
    monkeypatch.setattr(sys, "argv", ["split_quality.py", *given])
    split_quality.main()
    found = json.loads(capsys.readouterr().out)["prose"]
    assert list(found) == ["fixed", "delimiters", "dynamic", "online", "slots"]
    assert found["fixed"]["length"] == 16 and all(12 <= found[kind]["length"] <= 20 for kind in ("dynamic", "online"))
    # What each candidate scores here is what online splitting cuts by.
    assert found["online"]["score"] > found["fixed"]["score"]
    assert all(0 < row["mean"] <= found["slots"]["mean"] + 0.02 for row in found.values())

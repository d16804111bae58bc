"""The script that measures, on the tiny bundle: its tables are there, and its soak fails when a turn is lost."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest


def run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import serve_load

    options = ["--memory", "1MiB", "--threads", "1", "--rows", "1", "2", "--active", "1", "--tokens", "6"]
    monkeypatch.setattr(sys, "argv", ["serve_load.py", str(bundle), *options, "--soak", "80"])
    serve_load.main()


def test_its_tables(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run(tiny_bundle, monkeypatch)
    out = capsys.readouterr().out
    sessions = re.findall(r"budget ([\d.]+) \(.*a row, (\d+) sessions", out)
    assert [budget for budget, _ in sessions] == ["0.25", "0.5", "1"] and int(sessions[0][1]) > int(sessions[2][1])
    assert len(re.findall(r"\d rows: [\d.]+ \([\d.]+ times\)", out)) == 2
    assert re.search(r"  2 rows, 1 of them generating: [\d.]+ \([\d.]+ times\)", out)
    assert re.search(r"80 turns: 80 ended, \d+ cancelled, 0 refused; memory grew by", out)


def test_a_lost_turn_is_a_failure(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    import serve_load

    soak = serve_load.soak
    monkeypatch.setattr(serve_load, "soak", lambda server, turns: (soak(server, turns)[0] - 1, 0, 0))
    with pytest.raises(SystemExit, match="turns were lost"):
        run(tiny_bundle, monkeypatch)

"""Pictures are drawn of what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.evaluate.plots import _recovered, draw


def table(reported: bool) -> dict[str, Any]:
    score = {"mean": 0.5, "low": 0.4, "high": 0.6}
    ends = {"full": {**score, "mean": 0.9}, "no_context": {**score, "mean": 0.1}}
    task = {"unit": "share", "higher_is_better": True, "reported": reported, **ends}
    rows = [
        {"method": method, "budget": budget, "kept_share": budget, "tasks": {"passkey": score}}
        for method in ("semanticache", "kvpress/SnapKV")
        for budget in (0.2, 0.5)
    ]
    return {"model": "m", "context": 64, "tasks": {"passkey": task}, "rows": rows}


def test_both_pictures_are_drawn_where_something_is_reported(tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert [path.name for path in draw(table(True), tmp_path)] == ["quality.png", "tasks.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert draw(table(False), tmp_path) == []


def test_bars_go_from_no_context_to_the_full_cache():
    task = table(True)["tasks"]["passkey"]
    assert _recovered(task, {"mean": 0.9}) == 1 and _recovered(task, {"mean": 0.1}) == 0
    assert _recovered(task, {"mean": 0.5}) == pytest.approx(0.5) and _recovered(task, {"mean": 0.0}) == 0
    falling = {"full": {"mean": 0.0}, "no_context": {"mean": 2.0}}
    assert _recovered(falling, {"mean": 0.5}) == 0.75

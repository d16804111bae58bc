"""Methods side by side give the cells that they give one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.entries import Entry
from semkv_deploy.evaluate.run import Plan, evaluate
from semkv_deploy.evaluate.side_by_side import measure_side_by_side

from .test_run import numbers

METHODS = [Entry("streaming-llm", "streaming-llm"), Entry("semanticache", "semanticache")]


def test_cells_are_those_of_one_process(plan_at: Callable[..., Plan], tmp_path: Path):
    told: list[str] = []
    side, one = plan_at(tmp_path / "side", METHODS, ("prose",)), plan_at(tmp_path / "one", METHODS, ("prose",))
    measure_side_by_side(side, 2, lambda what, share: told.append(what))
    assert {"streaming-llm: measured", "semanticache: measured"} <= set(told)
    files = sorted((tmp_path / "side" / "cells").iterdir())
    assert len(files) == 4  # both ends, and both methods
    written = [file.stat().st_mtime_ns for file in files]
    assert numbers(list(evaluate(side))) == numbers(list(evaluate(one)))
    assert [file.stat().st_mtime_ns for file in files] == written


def test_what_fails_in_a_process_is_said_here(plan_at: Callable[..., Plan], tmp_path: Path):
    plan = plan_at(tmp_path, [*METHODS[:1], Entry("kvpress/SnapKV", "SnapKV")], ("prose",))
    with pytest.raises(SemkvError) as caught:
        measure_side_by_side(replace(plan, peers_python=tmp_path / "missing"), 2, lambda what, share: None)
    error: Any = caught.value
    assert error.where and str(error).count("..") == 0

"""Isolated turns in libsemkv: rows whose older turns differ in size, overflow, undo, and files in both directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ..bundle.test_contract import words
from ..runtime.isolated_reference import Statement
from .driver import Driver
from .test_equality import same_state, session_of

NAMES = ["streaming-llm, isolated", "semanticache, by head, isolated at turns", "importance, fitted, isolated"]
TURNS = [[40, 33], [25, 90], [130, 7], [64, 31], [1, 150], [50, 20]]


@pytest.mark.parametrize("name", NAMES)
def test_six_turns_end_apart(name: str, driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Logits, slots, caches and counters after every turn; in the middle each goes on with what the other saved."""
    bundle = bundle_of(name, budgets=[0.25])
    session = session_of(bundle, 2)
    with Driver(driver) as cpp:
        cpp.open(bundle, 2)
        for turn, counts in enumerate(TURNS):
            prompts = [words(10 * turn + row, count) for row, count in enumerate(counts)]
            np.testing.assert_array_equal(cpp.prefill(prompts), session.prefill(prompts))
            active = [True, turn % 2 == 0]
            ours, theirs = cpp.step([5, 6], active), session.step([5, 6], np.array(active)).copy()
            np.testing.assert_array_equal(ours[np.array(active)], theirs[np.array(active)])
            for row in (0, 1) if turn != 3 else (0,):
                session.end_turn(row)
                cpp("end_turn", row=row)
            same_state(session, cpp, tmp_path)
            if turn == 2:
                session.save(tmp_path / "here")
                cpp("save", path=str(tmp_path / "there"))
                session.load(tmp_path / "there")
                cpp("load", path=str(tmp_path / "here"))
        session.compress(1)
        cpp("compress", row=1)
        same_state(session, cpp, tmp_path)
        stats = cpp("stats", row=0)
        assert stats["compressions"] == session.stats.runs > 5 and stats["evicted"] == session.stats.evicted


def test_slots_are_those_of_the_statement(driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Not by way of Python's session; one row is pinned, and one taken back."""
    from safetensors.numpy import load_file

    bundle = bundle_of(NAMES[0], budgets=[0.25])
    rows = [Statement(128, 96, 0.25, piece=32) for _ in range(2)]
    with Driver(driver) as cpp:
        cpp.open(bundle, 2)
        for turn, counts in enumerate(TURNS):
            cpp.prefill([words(turn + row, count) for row, count in enumerate(counts)])
            for row, count in zip(rows, counts, strict=True):
                row.append(count)
            if turn == 0:
                cpp("pin", row=0)
                rows[0].pin()
            cpp("end_turn")
            for row in rows:
                row.end()
            # A turn that begins, and is taken back: the one before it is finished by then.
            cpp.prefill([[], words(3, 4)])
            cpp("undo", row=1)
            rows[1].begin()
            cpp("save", path=str(tmp_path / "now"))
            saved = load_file(tmp_path / "now")
            for number, row in enumerate(rows):
                live = saved["length"][0, number]
                assert saved["column.slot_position.00"][number, 0, :live].tolist() == row.kept

"""Turns that are taken back, what is pinned, and sessions with more slots than their budget: as in Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy import open_bundle, open_session
from semkv_deploy.errors import SemkvError

from ..bundle.test_contract import words
from .driver import CppError, Driver
from .test_equality import converse, same_state, session_of

BAD_ARGUMENT = 1
CALLS: dict[str, str] = {"undo": "undo_turn", "pin": "pin"}


def same_refusal(session: Any, cpp: Driver, do: str, **arguments: Any) -> str:
    """Both refuse a call, with one sentence."""
    with pytest.raises(CppError) as ours:
        cpp(do, **arguments)
    with pytest.raises(SemkvError) as theirs:
        getattr(session, CALLS[do])(**arguments)
    assert str(ours.value) == str(theirs.value) and ours.value.code == BAD_ARGUMENT
    return str(ours.value)


@pytest.mark.parametrize("name", ["semanticache", "importance", "sonic", "dynsplit", "dynsplit-select", "full"])
def test_turns_are_taken_back(name: str, driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """One row's, ended or not; what follows is as if it had never been."""
    bundle = bundle_of(name)
    session = session_of(bundle, 2)
    with Driver(driver) as cpp:
        cpp.open(bundle, 2)
        same_refusal(session, cpp, "undo", row=0)
        for turn, ended in enumerate((False, True)):
            prompts = [words(turn, 25), words(turn + 5, 18)]
            np.testing.assert_array_equal(cpp.prefill(prompts), session.prefill(prompts))
            session.end_turn()
            cpp("end_turn")
            more = [words(turn + 9, 20), words(turn + 11, 20)]
            np.testing.assert_array_equal(cpp.prefill(more), session.prefill(more))
            if ended:
                session.end_turn(1)
                cpp("end_turn", row=1)
            session.undo_turn(1)
            cpp("undo", row=1)
            same_state(session, cpp, tmp_path)
            again = [words(turn + 20, 9), words(turn + 21, 30)]
            np.testing.assert_array_equal(cpp.prefill(again), session.prefill(again))
            same_state(session, cpp, tmp_path)
        session.reset()
        cpp("reset")
        if name in ("full", "dynsplit-select"):  # which compress nothing here
            return
        # Once something was compressed since it began a turn stays, and both say so.
        for tokens in (100, 300):
            session.prefill([words(1, tokens), []])
            cpp("prefill", rows=[words(1, tokens), []])
        assert "something was compressed since it began" in same_refusal(session, cpp, "undo", row=0)
        same_state(session, cpp, tmp_path)


@pytest.mark.parametrize("name", ["importance", "importance, predicted, at turns, no sinks", "sonic"])
def test_what_is_pinned_stays(name: str, driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    bundle = bundle_of(name)
    session = session_of(bundle, 2)
    with Driver(driver) as cpp:
        cpp.open(bundle, 2)
        prompts = [words(1, 24), words(2, 18)]
        np.testing.assert_array_equal(cpp.prefill(prompts), session.prefill(prompts))
        if "predicted" in name:
            # Its scores are means over blocks, or it asks no queries: both sides say so.
            pins = any(behaviour.pins for behaviour in session.behaviours)
            if not pins:
                assert "pins nothing" in same_refusal(session, cpp, "pin")
                return
        session.pin(0)
        cpp("pin", row=0)
        same_state(session, cpp, tmp_path)
        converse(session, cpp, 3, tmp_path, turns=2)
        assert session.stats.runs > 0
        for row in range(2):
            held = session.slot_position[0][row, 0, : session.length[0, row]]
            stays = set(range(24 if row == 0 else 18)) <= set(held.tolist())
            assert stays == (row == 0) or name != "importance"


def test_too_much_is_pinned(driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Nothing is pinned then."""
    for name in ("importance", "sonic", "semanticache"):
        bundle = bundle_of(name)
        session = session_of(bundle, 2)
        with Driver(driver) as cpp:
            cpp.open(bundle, 2)
            prompts = [words(1, 240), []]
            np.testing.assert_array_equal(cpp.prefill(prompts), session.prefill(prompts))
            message = same_refusal(session, cpp, "pin")
            assert ("capacity is too small" in message) == (name != "semanticache")
            same_state(session, cpp, tmp_path)


def test_more_slots_than_the_budget(driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    bundle = bundle_of("semanticache")
    capacity = 384
    session = open_session(open_bundle(bundle), batch=2, threads=1, capacity=capacity)
    with Driver(driver) as cpp:
        cpp.open(bundle, 2, capacity=capacity)
        assert cpp("info")["capacity"] == capacity > session_of(bundle, 1).contract.capacity
        converse(session, cpp, 0, tmp_path)
        assert cpp("info")["cache_bytes"] > 0
        with pytest.raises(CppError, match=r"capacity: not a capacity .*expected 256 slots or more, got 64"):
            cpp.open(bundle, 2, capacity=64)
        with pytest.raises(CppError, match="a table of blocks has the size that it was built with"):
            cpp.open(bundle_of("dynsplit-select"), 2, capacity=capacity)

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
CALLS: dict[str, str] = {"undo": "undo_turn", "pin": "pin", "keep": "keep_of_turns", "trim": "trim_turns"}


def same_refusal(session: Any, cpp: Driver, do: str, **arguments: Any) -> str:
    """Both refuse a call, with one sentence."""
    with pytest.raises(CppError) as ours:
        cpp(do, **arguments)
    with pytest.raises(SemkvError) as theirs:
        getattr(session, CALLS[do])(**arguments)
    assert str(ours.value) == str(theirs.value) and ours.value.code == BAD_ARGUMENT
    return str(ours.value)


@pytest.mark.parametrize(
    "name", ["semanticache", "streaming-llm, isolated", "importance", "sonic", "dynsplit", "dynsplit-select", "full"]
)
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
    for name in ("importance", "sonic", "semanticache", "importance, fitted, isolated"):
        bundle = bundle_of(name)
        session = session_of(bundle, 2)
        with Driver(driver) as cpp:
            cpp.open(bundle, 2)
            prompts = [words(1, 240), []]
            np.testing.assert_array_equal(cpp.prefill(prompts), session.prefill(prompts))
            message = same_refusal(session, cpp, "pin")
            assert ("capacity is too small" in message) == (name != "semanticache")
            same_state(session, cpp, tmp_path)


def test_what_is_kept_of_turns(driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Of those that are finished later, by number and by share; and what finished ones lose afterwards."""
    bundle = bundle_of("sonic")
    session = session_of(bundle, 2)
    lengths = []
    with Driver(driver) as cpp:
        cpp.open(bundle, 2)
        for number, kept in enumerate([{}, {"tokens": 2}, {"share": 0.1}, {"tokens": 1}]):
            if kept:
                session.keep_of_turns(**kept)
                cpp("keep", **kept)
            prompts = [words(10 * number + row, 40) for row in range(2)]
            np.testing.assert_array_equal(cpp.prefill(prompts), session.prefill(prompts))
            session.end_turn()
            cpp("end_turn")
            session.compress()
            cpp("compress")
            same_state(session, cpp, tmp_path)
            lengths.append(int(session.length[0, 0]))
        grown = np.diff([0, *lengths]).tolist()
        assert len(set(grown)) == 4, grown
        session.trim_turns(1, 1)
        cpp("trim", tokens=1, row=1)
        same_state(session, cpp, tmp_path)
        assert session.length[0, 1] < session.length[0, 0] == lengths[-1]
        session.trim_turns(1)
        cpp("trim", tokens=1)
        converse(session, cpp, 4, tmp_path, turns=2)
        most = session._keeper().behaviour.most
        assert "one of both is given" in same_refusal(session, cpp, "keep", share=0.5, tokens=3)
        assert "fewer Nexus rows" in same_refusal(session, cpp, "keep", tokens=100 * most)
        for wrong in ({"share": 1.5}, {"tokens": -1}, {}, {"share": -0.5}):
            with pytest.raises(CppError, match="keep_of_turns: one of both is given"):
                cpp("keep", **wrong)
        same_refusal(session, cpp, "trim", tokens=0)
        same_state(session, cpp, tmp_path)
        assert cpp("info")["keeps_turns"] == 1
    other = bundle_of("semanticache")
    with Driver(driver) as cpp:
        cpp.open(other, 2)
        assert cpp("info")["keeps_turns"] == 0
        assert "makes nothing of turns" in same_refusal(session_of(other, 2), cpp, "keep", share=0.5)
        assert "makes nothing of turns" in same_refusal(session_of(other, 2), cpp, "trim", tokens=3)


@pytest.mark.parametrize("name", ["semanticache", "sonic", "full"])
def test_whether_more_tokens_fit(name: str, driver: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Asked beforehand: the same sentence as Python's, and as a prompt of so many would get."""
    bundle = bundle_of(name)
    session = session_of(bundle, 2)
    with Driver(driver) as cpp:
        cpp.open(bundle, 2)
        prompts = [words(1, 150), words(2, 9)]
        np.testing.assert_array_equal(cpp.prefill(prompts), session.prefill(prompts))
        session.end_turn()
        cpp("end_turn")
        for row in range(2):
            left = next(count for count in range(600, 0, -1) if fits(session, row, count))
            cpp("check", row=row, count=left)
            cpp("check", row=row, count=0)
            with pytest.raises(SemkvError) as theirs:
                session.check_append(row, left + 1)
            with pytest.raises(CppError) as ours:
                cpp("check", row=row, count=left + 1)
            assert str(ours.value) == str(theirs.value) and ours.value.code in (5, 6)
        same_state(session, cpp, tmp_path)
        with pytest.raises(CppError, match=r"row: a wrong argument \(expected 0 to 1, got 2\)"):
            cpp("check", row=2, count=1)
        with pytest.raises(CppError, match="count: a wrong argument"):
            cpp("check", row=0, count=-1)


def fits(session: Any, row: int, count: int) -> bool:
    try:
        session.check_append(row, count)
    except SemkvError:
        return False
    return True


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

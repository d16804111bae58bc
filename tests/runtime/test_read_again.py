"""Reading again: each token once, before it may go, and nothing else of the conversation changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Importance
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.session import Session

from .test_rows import same, snapshot, text


@pytest.fixture(scope="module")
def bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("importance") / "bundle"
    options: dict[str, Any] = {"method": Importance(fit="none"), "budget_by": "uniform", "weights": "fp32"}
    return build_bundle(tiny_export / "decoder.onnx", out, budgets=[0.25, 1.0], **options)


class Recorder:
    """An engine that notes the tokens of recorded runs, and may fail at one."""

    def __init__(self, inner: Any, fail_at: int | None = None) -> None:
        self.inner, self.opened, self.batch, self.contract = inner, inner.opened, inner.batch, inner.contract
        self.read, self.write, self.reset, self.run_groups = inner.read, inner.write, inner.reset, inner.run_groups
        self.recorded: list[list[int]] = [[] for _ in range(inner.batch)]
        self.runs, self.fail_at = 0, fail_at

    def run(self, program: str, feeds: Any, *, row: int | None = None) -> Any:
        if feeds["record"].any():
            assert row is not None
            self.runs += 1
            if self.runs == self.fail_at:
                raise KeyboardInterrupt
            length, capacity = feeds["length"].max(), min(group.capacity for group in self.contract.cache.groups)
            assert length + feeds["input_ids"].shape[1] <= capacity
            assert feeds["position_ids"].max() < self.contract.max_context
            self.recorded[row] += feeds["input_ids"][0].tolist()
        return self.inner.run(program, feeds, row=row)


def pieces(seed: int, total: int) -> Iterator[list[int]]:
    ids = text(seed, total)
    for start, size in ((0, 70), (70, 3), (73, 150), (223, total - 223)):
        yield ids[start : start + size]


def test_every_token_is_read_again_once_and_in_order(bundle: Bundle):
    engine = Recorder(open_session(bundle, budget=0.25, batch=2).engine)
    session = Session(engine)  # type: ignore[arg-type]
    for first, second in zip(pieces(1, 400), pieces(2, 300), strict=True):
        session.prefill([first, second])
        session.step([7, 8])
    seen = [
        [token for piece in pieces(seed, total) for token in (*piece, stepped)]
        for seed, total, stepped in ((1, 400, 7), (2, 300, 8))
    ]
    for row in range(2):
        read = engine.recorded[row]
        assert 0 < len(read) < len(seen[row]) and read == seen[row][: len(read)]
    session.compress(0)
    assert engine.recorded[0] == seen[0] and len(engine.recorded[1]) < len(seen[1])
    again = len(engine.recorded[0])
    session.compress(0)
    assert len(engine.recorded[0]) == again


def test_only_attention_is_written_down(bundle: Bundle):
    """Keys, values, lengths, positions and columns of what is live are as before; attention rises, up to 1."""
    session = open_session(bundle, budget=0.25)
    session.prefill(text(3, 90))
    before = snapshot(session)
    session.behaviours[0].compress(np.array([True]))
    after = snapshot(session)
    raised = {name for name in before if not np.array_equal(before[name], after[name])}
    assert raised == {"slot_attention.0.0", "slot_attention.1.0"}
    for name in raised:
        assert (after[name] > before[name]).all() and (after[name] <= 1).all()
    dead = [session.engine.read("slot_attention", group)[0, :, 90:] for group in range(2)]
    assert not any(each.any() for each in dead)


def test_budget_one_reads_nothing_again(bundle: Bundle):
    engine = Recorder(open_session(bundle, budget=1.0).engine)
    session = Session(engine)  # type: ignore[arg-type]
    session.prefill(text(4, 300))
    session.end_turn()
    assert engine.recorded == [[]] and session.behaviours == []


def test_a_failure_while_reading_again_is_taken_back(bundle: Bundle):
    """What is read later is what a session that never failed reads."""
    engine = Recorder(open_session(bundle, budget=0.25).engine, fail_at=2)
    session, whole = Session(engine), open_session(bundle, budget=0.25)  # type: ignore[arg-type]
    for each in (session, whole):
        each.prefill(text(5, 100))
    before = snapshot(session)
    with pytest.raises(KeyboardInterrupt):
        session.compress()
    after = snapshot(session)
    assert all(np.array_equal(before[name], after[name]) for name in before if not name.startswith("slot_attention"))
    for each in (session, whole):
        each.compress()
        each.prefill(text(6, 200))
    assert same(snapshot(whole), snapshot(session))


def test_a_saved_session_goes_on_with_what_is_unread(bundle: Bundle, tmp_path: Path):
    session = open_session(bundle, budget=0.25, batch=2)
    session.prefill([text(1, 60), text(2, 80)])
    session.save(tmp_path / "s", row=1)
    other = open_session(bundle, budget=0.25)
    other.load(tmp_path / "s")
    alone = open_session(bundle, budget=0.25)
    alone.prefill(text(2, 80))
    for each in (other, alone):
        each.prefill(text(3, 100))
    assert same(snapshot(other), snapshot(alone)) and other.stats.runs == alone.stats.runs > 0


def test_a_target_that_cannot_do_it_is_refused(tiny_export: Path, tmp_path: Path):
    method = Importance(queries="repeat")
    words = r"queries=repeat reads the context again.*--method-option queries=predicted"
    with pytest.raises(SemkvError, match=words):
        build_bundle(tiny_export / "decoder.onnx", tmp_path / "b", budgets=[0.25], method=method, target="tensorrt-rtx")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("when", ["full", "turn"])
def test_what_is_pinned_stays_through_every_compression(when: Any, tiny_export: Path, tmp_path: Path):
    """At a turn's end too, where the budget's share of so few tokens would be less than what is pinned."""
    method = Importance(fit="none", compress_at=when)
    decoder = tiny_export / "decoder.onnx"
    built = build_bundle(decoder, tmp_path / "b", budgets=[0.25], method=method, groups="head", weights="fp32")
    session = open_session(built, batch=2)
    session.prefill([text(1, 40), text(5, 9)])
    session.pin(row=0)
    session.end_turn()
    for turn in range(4):
        session.prefill([text(turn, 70), text(turn, 60)])
        session.end_turn()
    assert session.stats.runs > 1
    for column in session.slot_position:
        assert column[0, 0, :40].tolist() == list(range(40)) != column[1, 0, :40].tolist()
    session.save(tmp_path / "pinned")
    session = open_session(built, batch=2, state=tmp_path / "pinned")
    session.prefill([text(7, 100), text(8, 100)])
    assert all(column[0, 0, :40].tolist() == list(range(40)) for column in session.slot_position)


def test_sinks_count_beside_what_is_pinned(bundle: Bundle):
    """48 slots stay beside the window: four sinks before the turn, and no more than 44 of it."""
    for count in (44, 45):
        session = open_session(bundle, budget=0.25)
        session.prefill(text(1, 30))
        session.end_turn()
        session.prefill(text(2, count))
        if count == 45:
            with pytest.raises(SemkvError, match="at most 48 pinned slots of 128, got 49"):
                session.pin()
            continue
        session.pin()
        session.end_turn()
        for turn in range(3):
            session.prefill(text(turn, 70))
        for column in session.slot_position:
            assert {0, 1, 2, 3, *range(30, 74)} <= {*column[0, 0, : session.length[0, 0]].tolist()}


def test_what_cannot_be_pinned_is_refused(bundle: Bundle):
    session = open_session(bundle, budget=0.25)
    session.prefill(text(1, 90))
    before = snapshot(session)
    with pytest.raises(SemkvError, match=r"too small for what is pinned.*at most 48 pinned slots of 128, got 90"):
        session.pin()
    assert same(before, snapshot(session))
    lost = open_session(bundle, budget=0.25)
    lost.prefill(text(1, 200))
    with pytest.raises(SemkvError, match=r"too small for what is pinned.*got 200"):
        lost.pin()


def test_a_turn_that_is_taken_back_leaves_no_pin(bundle: Bundle):
    session = open_session(bundle, budget=0.25)
    session.prefill(text(1, 30))
    session.end_turn()
    session.prefill(text(2, 20))
    session.pin()
    session.undo_turn()
    session.prefill(text(3, 20))
    assert all(session.engine.read("slot_attention", group).max() < 2 for group in range(len(session.length)))

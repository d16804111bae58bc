"""Turns that are compressed one by one: what is kept, what never changes again, and what a full cache does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Importance, Method, SemantiCache, StreamingLLM, method_from_options
from semkv_deploy.methods.behaviours import IsolatedTurns
from semkv_deploy.runtime.behaviours.isolated_turns import TurnIsolator
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.session import Session
from semkv_deploy.validate.reference import ReferenceEngine

from .isolated_reference import Statement
from .test_rows import same, snapshot, text

BUDGET = 0.25
"""Of 512 tokens: 128 slots, of which 96 stay; pieces of 32 (16 where tokens are read again)."""

FORMS: dict[str, Method] = {
    "streaming-llm": StreamingLLM(turns="isolated"),
    "streaming-llm, at turns": StreamingLLM(turns="isolated", compress_at="turn"),
    "semanticache, by head": SemantiCache(turns="isolated", cluster_by="head"),
    "importance, fitted": Importance(turns="isolated"),
    "importance, merged": Importance(turns="isolated", queries="predicted", fit="merge"),
}

Make = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def bundle_of(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Bundle] = {}

    def bundle(name: str) -> Bundle:
        if name not in made:
            out = tmp_path_factory.mktemp("isolated") / "bundle"
            options: dict[str, Any] = {"budgets": [BUDGET, 1.0], "weights": "fp32", "native": "off"}
            decoder = tiny_export / "decoder.onnx"
            made[name] = build_bundle(decoder, out, method=FORMS[name], budget_by="uniform", **options)
        return made[name]

    return bundle


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32").eval()


def frozen(session: Session) -> Any:
    """`[groups,B]`."""
    (isolator,) = (each for each in session.behaviours if isinstance(each, TurnIsolator))
    return isolator.frozen


def statement(session: Session) -> Statement:
    room = session.contract.make_room
    assert isinstance(room, IsolatedTurns)
    return Statement(session.contract.capacity, room.keep_slots[0], room.turn_share[0], session.contract.prefill_chunk)


def check(session: Session, rows: list[Statement]) -> None:
    for group in range(len(session.length)):
        for row, said in enumerate(rows):
            live = session.length[group, row]
            assert session.slot_position[group][row, 0, :live].tolist() == said.kept, f"group {group}, row {row}"


SIX_TURNS = [[40, 33], [25, 90], [130, 7], [64, 31], [1, 160], [90, 20], [20, 60]]
"""Tokens of two rows: turns of one token and of more than the capacity, and more of them than it has room for."""


@pytest.mark.parametrize("name", ["streaming-llm", "streaming-llm, at turns"])
def test_what_seven_turns_keep_is_what_the_statement_says(name: str, bundle_of: Make):
    """Prompts and steps; the second row's reply is shorter, and one of its turns is not ended at all."""
    session = open_session(bundle_of(name), budget=BUDGET, batch=2)
    rows = [statement(session) for _ in range(2)]
    at_once = name.endswith("turns")
    for turn, counts in enumerate(SIX_TURNS):
        counts = [min(count, 510 - row.position) for count, row in zip(counts, rows, strict=True)]
        session.prefill([text(turn + 10 * row, count) for row, count in enumerate(counts)])
        for row, count in zip(rows, counts, strict=True):
            row.append(count)
        check(session, rows)
        for active in ([True, True], [True, False]) if turn < 6 else ():
            session.step([3, 4], np.array(active))
            for row, on in zip(rows, active, strict=True):
                if on:
                    row.append(1)
        check(session, rows)
        for number in (0, 1) if turn != 3 else (0,):
            session.end_turn(number)
            rows[number].end(at_once)
        check(session, rows)
    assert session.length.max() <= 128 and session.position.min() > 380


Action = st.one_of(
    st.tuples(st.just("prompt"), st.lists(st.integers(0, 150), min_size=2, max_size=2)),
    st.tuples(st.just("prompt"), st.lists(st.integers(0, 30), min_size=2, max_size=2)),
    st.tuples(st.just("end"), st.sampled_from([[0], [1], [0, 1]])),
    st.tuples(st.just("compress"), st.sampled_from([[0], [1], [0, 1]])),
    st.tuples(st.just("saved"), st.sampled_from([[0], [1]])),
    st.tuples(st.just("pin"), st.sampled_from([[0], [1]])),
    st.tuples(st.just("reset"), st.sampled_from([[0], [1]])),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(Action, min_size=4, max_size=16))
def test_any_order_of_calls_keeps_what_the_statement_says(actions: list[Any], bundle_of: Make, tmp_path: Path):
    session = open_session(bundle_of("streaming-llm"), budget=BUDGET, batch=2)
    rows = [statement(session) for _ in range(2)]
    for number, (kind, what) in enumerate(actions):
        if kind == "prompt":
            counts = [min(count, 512 - row.position) for count, row in zip(what, rows, strict=True)]
            if not any(counts):
                continue
            session.prefill([text(number, count) for count in counts])
            for row, count in zip(rows, counts, strict=True):
                if count:
                    row.append(count)
        for row in what if kind != "prompt" else ():
            if kind == "end":
                session.end_turn(row)
                rows[row].end()
            elif kind == "compress":
                session.compress(row)
                rows[row].end(at_once=True)
            elif kind == "saved":
                session.save(tmp_path / "row", row=row)
                session.reset(row)
                session.load(tmp_path / "row", row=row)
            elif kind == "reset":
                session.reset(row)
                rows[row] = statement(session)
            elif len(rows[row].kept) > 48 or len(rows[row].open) < rows[row].position - rows[row].begun:
                with pytest.raises(SemkvError, match="capacity is too small for what is pinned"):
                    session.pin(row)
            else:
                session.pin(row)
                rows[row].pin()
        check(session, rows)


@pytest.mark.parametrize("name", FORMS)
def test_six_turns_match_the_reference_engine(name: str, bundle_of: Make, model: Any):
    """Two rows whose turns differ in length and end apart, so that they have older turns of different sizes."""
    bundle = bundle_of(name)
    session = open_session(bundle, budget=BUDGET, batch=2)
    opened, facts = bundle.built("onnxruntime-cpu", BUDGET), bundle.manifest.model
    engine = ReferenceEngine(opened, model, facts=facts, method=bundle.manifest.method, batch=2)
    reference = Session(engine)
    for turn, counts in enumerate([[30, 22], [17, 60], [90, 9], [25, 40], [31, 150], [40, 12]]):
        prompts = [text(turn + 10 * row, count) for row, count in enumerate(counts)]
        # What is solved for in steps carries rounding along.
        atol = 3e-2 if "fitted" in name else 4e-3
        np.testing.assert_allclose(session.prefill(prompts), reference.prefill(prompts), atol=atol)
        for each in (session, reference):
            each.end_turn(turn % 2)
            if turn % 3:
                each.end_turn()
        ours, theirs = snapshot(session), snapshot(reference)
        for key, array in ours.items():
            # Of values what is solved for is a share.
            rtol = 3e-2 if "fitted" in name and key.startswith("value") else 1e-7
            np.testing.assert_allclose(array, theirs[key], rtol=rtol, atol=atol, err_msg=f"turn {turn}, {key}")
        np.testing.assert_array_equal(frozen(session), frozen(reference))
    assert session.stats.runs == reference.stats.runs > 5
    assert len(set(frozen(session)[0].tolist())) == 2


@pytest.mark.parametrize("name", FORMS)
def test_what_older_turns_kept_is_the_same_to_the_bit(name: str, bundle_of: Make):
    """From the moment their turn is compressed, however they are read and whatever is compressed behind them."""
    session = open_session(bundle_of(name), budget=BUDGET, batch=2)
    held: dict[tuple[int, int], list[Any]] = {}
    dropped = 0
    for turn in range(6):
        session.prefill([text(turn, 26 + 5 * turn), text(20 + turn, 36)])
        session.step([5, 6])
        before = session.length.copy()
        session.end_turn()
        session.compress()
        assert (session.length == frozen(session)).all()
        dropped += int((before - session.length).sum())
        for group, row in np.ndindex(session.length.shape):
            now = kept(session, group, row)
            for head, was in enumerate(held.get((group, row), [])):
                np.testing.assert_array_equal(now[head][: len(was)], was, err_msg=f"turn {turn}, group {group}")
            held[group, row] = now
    assert dropped > 600


def kept(session: Session, group: int, row: int) -> list[Any]:
    """By head, `[slots, 2D + 1]` keys, values and biases of what finished turns kept.

    Heads that choose for themselves may need fewer slots than their group has: what is hidden says nothing, and goes.
    """
    live = int(frozen(session)[group, row])
    key, value, bias = (session.engine.read(name, group)[row, :, :live] for name in ("key", "value", "slot_bias"))
    together = np.concatenate([key, value, bias[..., None]], -1)
    return [head[said > -np.inf] for head, said in zip(together, bias, strict=True)]


def test_a_method_that_fits_does_fit_inside_a_turn(bundle_of: Make):
    """What stays of the second turn stands for what went of it: biases that are not 0, behind older ones."""
    session = open_session(bundle_of("importance, fitted"), budget=BUDGET)
    biases = []
    for turn in range(2):
        first = int(session.length[0, 0])
        session.prefill(text(turn, 70))
        session.end_turn()
        session.compress()
        biases.append(session.engine.read("slot_bias", 0)[0, :, first : session.length[0, 0]])
    assert all(np.abs(each).max() > 0.1 for each in biases)


@pytest.mark.parametrize("name", FORMS)
def test_a_turn_longer_than_the_cache_leaves_older_turns_alone(name: str, bundle_of: Make):
    """Where they have no more than half of what may stay: it is compressed by itself, again and again."""
    session = open_session(bundle_of(name), budget=BUDGET)
    for turn in range(4):
        session.prefill(text(turn, 40))
        session.end_turn()
    session.prefill(text(5, 20))
    held = frozen(session)[:, 0].copy()
    assert 0 < held.min() <= held.max() <= 48
    before = [kept(session, group, 0) for group in range(len(held))]
    session.prefill(text(6, 300))
    assert (frozen(session)[:, 0] == held).all() and session.length.max() <= 128
    for group, heads in enumerate(before):
        for now, was in zip(kept(session, group, 0), heads, strict=True):
            np.testing.assert_array_equal(now[: len(was)], was)


def keeping(session: Session, share: float) -> None:
    """Turns keep more than the budget says, so that a few of them fill a cache."""
    (isolator,) = (each for each in session.behaviours if isinstance(each, TurnIsolator))
    isolator.behaviour = isolator.behaviour.model_copy(update={"turn_share": (share, share)})


@pytest.mark.parametrize("name", FORMS)
def test_older_turns_give_way_down_to_half_of_what_may_stay(name: str, bundle_of: Make):
    """The open turn's slots stay as they are meanwhile, until it has the other half."""
    session = open_session(bundle_of(name), budget=BUDGET)
    keeping(session, 0.9)
    for turn in range(4):
        session.prefill(text(turn, 30))
        session.end_turn()
    session.compress()
    exact = not name.startswith("semanticache")  # which may merge more than it must
    older = frozen(session).copy()
    assert older.max() <= 96 and (older.min() == 96 or not exact)
    session.prefill(text(8, 30))
    assert (session.length - frozen(session) == 30).all()
    session.prefill(text(9, 200))
    assert session.length.max() <= 128 and frozen(session).max() <= 48 and (frozen(session).min() == 48 or not exact)
    session.end_turn()
    session.compress()
    assert session.length.max() <= 96


def test_where_all_is_alike_the_oldest_go_first(bundle_of: Make):
    """Streaming-llm: what is left of older turns is the newest of them, and sinks."""
    session = open_session(bundle_of("streaming-llm"), budget=BUDGET)
    keeping(session, 0.9)
    said = statement(session)
    said.share = 0.9
    for turn in range(4):
        for count in (26, 60 if turn == 3 else 1):
            session.prefill(text(turn, count))
            said.append(count)
        session.end_turn()
        said.end()
        check(session, [said])
    assert said.older[:4] == [0, 1, 2, 3] and said.older[4] > 30 and len(said.older) < 96


def test_an_ended_turn_can_be_taken_back_until_the_next_begins(bundle_of: Make):
    session, other = (open_session(bundle_of("importance, fitted"), budget=BUDGET) for _ in range(2))
    for each in (session, other):
        each.prefill(text(1, 60))
        each.end_turn()
        each.prefill(text(2, 20))
        each.end_turn()
    session.prefill(text(3, 30))
    session.end_turn()
    session.undo_turn()
    other.prefill([9])
    other.undo_turn()
    assert same(snapshot(session), snapshot(other)) and (frozen(session) == frozen(other)).all()
    np.testing.assert_array_equal(session.prefill(text(4, 70)), other.prefill(text(4, 70)))
    for each in (session, other):
        each.end_turn()
        each.compress()
    assert same(snapshot(session), snapshot(other))
    session.prefill(text(5, 300))
    with pytest.raises(SemkvError, match="something was compressed since it began"):
        session.undo_turn()


def test_a_turn_that_was_finished_whole_can_be_taken_back(bundle_of: Make):
    """At once, and nothing of it had to go: what it froze is free again."""
    session = open_session(bundle_of("streaming-llm, at turns"), budget=BUDGET)
    session.prefill([5])
    session.end_turn()
    assert frozen(session)[:, 0].tolist() == [1, 1]
    session.undo_turn()
    assert frozen(session)[:, 0].tolist() == [0, 0] and session.position[0] == 0
    rows = [statement(session)]
    session.prefill(text(1, 50))
    session.end_turn()
    rows[0].append(50)
    rows[0].end(at_once=True)
    check(session, rows)


@pytest.mark.parametrize("name", ["streaming-llm", "importance, fitted"])
def test_what_is_pinned_stays_to_the_bit_through_every_overflow(name: str, bundle_of: Make):
    session = open_session(bundle_of(name), budget=BUDGET)
    session.prefill(text(1, 40))
    session.pin()
    before = [session.engine.read(buffer, 0)[0, :, :40].copy() for buffer in ("key", "value", "slot_bias")]
    session.prefill(text(2, 60))
    for turn in range(3):
        session.end_turn()
        session.prefill(text(turn, 120))
    assert session.slot_position[0][0, 0, :40].tolist() == list(range(40))
    for buffer, was in zip(("key", "value", "slot_bias"), before, strict=True):
        np.testing.assert_array_equal(session.engine.read(buffer, 0)[0, :, :40], was)
    with pytest.raises(SemkvError, match=r"capacity is too small for what is pinned.*at most 48 pinned slots of 128"):
        session.pin()


def test_pinning_is_taken_back_with_its_turn(bundle_of: Make):
    session = open_session(bundle_of("streaming-llm"), budget=BUDGET)
    session.prefill(text(1, 30))
    session.pin()
    session.undo_turn()
    rows = [statement(session)]
    session.prefill(text(2, 200))
    rows[0].append(200)
    check(session, rows)


@pytest.mark.parametrize("name", ["importance, fitted", "semanticache, by head"])
@pytest.mark.parametrize("ended", [True, False], ids=["between turns", "within one"])
def test_a_saved_session_goes_on_as_it_would_have(name: str, ended: bool, bundle_of: Make, tmp_path: Path):
    session = open_session(bundle_of(name), budget=BUDGET, batch=2)
    session.prefill([text(1, 70), text(2, 40)])
    session.end_turn()
    session.prefill([text(3, 50), text(4, 90)])
    if ended:
        session.end_turn(1)
    session.save(tmp_path / "row", row=1)
    other = open_session(bundle_of(name), budget=BUDGET)
    other.load(tmp_path / "row")
    assert (frozen(other)[:, 0] == frozen(session)[:, 1]).all() and frozen(other).min() > 0
    for turn, count in enumerate((30, 140)):
        expected = session.prefill([[], text(5 + turn, count)])[1]
        np.testing.assert_allclose(other.prefill(text(5 + turn, count))[0], expected, atol=2e-4)
        session.end_turn(1)
        other.end_turn()
    np.testing.assert_array_equal(other.length[:, 0], session.length[:, 1])
    for group, live in enumerate(other.length[:, 0]):
        np.testing.assert_array_equal(
            other.slot_position[group][0, :, :live], session.slot_position[group][1, :, :live]
        )


def test_a_budget_of_one_isolates_nothing(bundle_of: Make):
    bundle = bundle_of("streaming-llm")
    assert bundle.built("onnxruntime-cpu", 1.0).contract.behaviours == ()
    session = open_session(bundle, budget=1.0)
    for turn in range(3):
        session.prefill(text(turn, 60))
        session.end_turn()
    assert session.length[0, 0] == 180


def test_only_methods_that_compress_in_place_take_the_option():
    for kind in ("full", "sonic", "dynsplit-select"):
        with pytest.raises(SemkvError, match=f"{kind} does not take turns"):
            method_from_options(kind, {"turns": "isolated"})
    with pytest.raises(SemkvError, match=r"does not take turns.*got turns='apart'"):
        method_from_options("importance", {"turns": "apart"})


def test_more_sinks_than_older_turns_may_keep_are_refused(tiny_export: Path, tmp_path: Path):
    method = StreamingLLM(turns="isolated", sinks=49)
    with pytest.raises(SemkvError, match=r"sinks are more than older turns may keep.*at most 48, half of the 96 slots"):
        build_bundle(tiny_export / "decoder.onnx", tmp_path / "b", budgets=[BUDGET], method=method, weights="fp32")


def test_a_method_of_before_is_as_it_was():
    """Manifests that say nothing of turns."""
    assert SemantiCache.model_validate({"kind": "semanticache"}).turns == "together"


def test_models_with_sliding_windows_are_refused(bundle_of: Make):
    facts = bundle_of("streaming-llm").manifest.model.model_copy(update={"windows": (0, 40)})
    for method in FORMS.values():
        with pytest.raises(SemkvError, match=r"a sliding window does not allow.*windows of 40 tokens.*Leave turns=iso"):
            method.resolve(facts)
        assert method.model_copy(update={"turns": "together"}).resolve(facts)

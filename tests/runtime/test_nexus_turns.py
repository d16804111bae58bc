"""Turns that become Nexus rows: against a whole conversation under a mask, and what a caller may do with turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Full, Sonic
from semkv_deploy.methods.sonic_adapter import load_adapter
from semkv_deploy.methods.sonic_reference import conversation, masked_logits
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.session import Session
from semkv_deploy.validate.reference import ReferenceEngine
from tests.tiny import tiny_adapter_at

from .test_rows import same, snapshot, text

VOCAB, SINKS = 512, 4
BUDGET = 0.25
"""Of 512 tokens: 128 slots, of which 96 stay when a turn is cut."""


COMMON = tuple(range(500, 100, -3))
"""A third of the vocabulary."""


@pytest.fixture(scope="module", params=["appended", "spread"])
def adapter(request: pytest.FixtureRequest, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    common = COMMON if request.param == "spread" else ()
    return tiny_adapter_at(tiny_export, path, placement=request.param, common=common)


@pytest.fixture(scope="module")
def bundle(tiny_export: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("sonic") / "bundle"
    method = Sonic(adapter=str(adapter), kept=0.2)
    return build_bundle(
        tiny_export / "decoder.onnx", out, budgets=[BUDGET, 1.0], method=method, weights="fp32", native="off"
    )


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32").eval()


def reference_session(bundle: Bundle, model: Any, adapter: Path, batch: int = 1) -> Session:
    opened, facts = bundle.built("onnxruntime-cpu", BUDGET), bundle.manifest.model
    method = Sonic(adapter=str(adapter), kept=0.2).resolve(facts)
    return Session(ReferenceEngine(opened, model, facts=facts, method=method, batch=batch))


def sizes(turns: Sequence[Sequence[int]], kept: float, share: float = 1.0, most: int = 8) -> list[tuple[int, int]]:
    """Nexus rows and last tokens of turns, as the paper's ratio and our split say."""
    found = []
    for number, tokens in enumerate(turns):
        length = len(tokens) - (SINKS if number == 0 else 0)
        slots = math.ceil(kept * length)
        nexus = math.ceil(share * slots)
        found.append((min(nexus, most), slots - nexus) if slots < length else (0, 0))
    return found


TURNS = [text(seed, count) for seed, count in enumerate((40, 25, 33, 17, 51, 20, 1, 30, 22))]


@pytest.mark.parametrize("kept, share", [(0.2, 1.0), (0.3, 0.5)], ids=["Nexus rows", "and a recent window"])
def test_what_is_dropped_and_what_is_hidden_give_the_same_logits(
    kept: float, share: float, bundle: Bundle, adapter: Path, model: Any
):
    """Nine turns, one of a single token: each turn's logits are those of the whole conversation under a mask."""
    session = open_session(bundle, budget=BUDGET)
    session.keep_of_turns(share=kept)
    if share < 1:
        keeper = session._keeper()
        keeper.behaviour = keeper.behaviour.model_copy(update={"nexus_share": share})
    learned = load_adapter(adapter)
    of_turns = sizes(TURNS[:-1], kept, share)
    rows = conversation(TURNS, of_turns, learned, first_id=VOCAB, sinks=SINKS)
    expected = masked_logits(model, learned, rows).numpy()
    for number, tokens in enumerate(TURNS):
        logits = session.prefill(tokens, all_logits=True)
        where = [place for place, row in enumerate(rows) if row.turn == number and row.id < VOCAB]
        np.testing.assert_allclose(logits, expected[where], atol=1e-4, err_msg=f"turn {number}")
        stays = [place for place, row in enumerate(rows[: where[-1] + 1]) if row.stays or row.turn == number]
        for group in range(2):
            live = int(session.length[group, 0])
            assert session.slot_position[group][0, 0, :live].tolist() == [rows[place].position for place in stays]
        session.end_turn()
    counted = rows if learned.placement == "appended" else [row for row in rows if row.id < VOCAB]
    assert session.stats.runs > 6 and session.position[0] == len(counted)


def test_eight_turns_match_the_reference_engine(bundle: Bundle, adapter: Path, model: Any):
    """Two rows whose turns end apart, steps between, an overflow: lengths, columns, caches and logits."""
    session = open_session(bundle, budget=BUDGET, batch=2)
    reference = reference_session(bundle, model, adapter, batch=2)
    for turn in range(8):
        prompts = [text(turn, 31 + 2 * turn), text(20 + turn, 12 if turn != 5 else 140)]
        logits, expected = (each.prefill(prompts) for each in (session, reference))
        for step in range(4):
            np.testing.assert_allclose(logits, expected, atol=2e-3)
            token, wanted = expected.argmax(-1), np.array([True, step < 2])
            logits, expected = (np.where(wanted[:, None], each.step(token, wanted), 0) for each in (session, reference))
        for each in (session, reference):
            each.end_turn(turn % 2)
            if turn % 3 == 2:
                each.end_turn()
        ours, theirs = snapshot(session), snapshot(reference)
        for name, array in ours.items():
            np.testing.assert_allclose(array, theirs[name], atol=2e-3, err_msg=name)
    assert session.stats.runs == reference.stats.runs > 5


def test_a_budget_of_one_is_the_uncompressed_model_bit_for_bit(bundle: Bundle, tiny_export: Path, tmp_path: Path):
    """The adapter is in the graph, and no row has it."""
    full = build_bundle(
        tiny_export / "decoder.onnx", tmp_path / "full", budgets=[1.0], method=Full(), weights="fp32", native="off"
    )
    sessions = open_session(bundle, budget=1.0), open_session(full, budget=1.0)
    for turn in range(3):
        ours, theirs = (each.prefill(text(turn, 60)).copy() for each in sessions)
        np.testing.assert_array_equal(ours, theirs)
        ours, theirs = (each.step([9]).copy() for each in sessions)
        np.testing.assert_array_equal(ours, theirs)
        for each in sessions:
            each.end_turn()
    for group in range(2):
        for name in ("key", "value"):
            first, second = (each.engine.read(name, group)[:, :, :183] for each in sessions)
            np.testing.assert_array_equal(first, second)


def test_a_base_turn_is_the_base_models_bit_for_bit_below_budget_one(bundle: Bundle):
    """Until a turn is finished nothing tells the two apart."""
    small, whole = open_session(bundle, budget=BUDGET), open_session(bundle, budget=1.0)
    np.testing.assert_array_equal(small.prefill(text(1, 100)), whole.prefill(text(1, 100)))


def test_dropping_the_last_nexus_rows_is_never_having_had_them(bundle: Bundle):
    few, many = open_session(bundle, budget=BUDGET), open_session(bundle, budget=BUDGET)
    for session, tokens in ((few, 3), (many, 7)):
        session.keep_of_turns(tokens=tokens)
        session.prefill(text(1, 60))
        session.compress()
    many.trim_turns(3)
    np.testing.assert_array_equal(few.length, many.length)
    for name in ("key", "value"):
        for group in range(2):
            ours, theirs = (each.engine.read(name, group)[0, :, :7] for each in (few, many))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    many.slots.position[:] = few.position
    np.testing.assert_allclose(few.prefill(text(2, 20)), many.prefill(text(2, 20)), atol=1e-4)


def test_how_much_of_a_turn_stays_may_change_between_turns(bundle: Bundle):
    session = open_session(bundle, budget=BUDGET)
    kept = []
    for options in ({"share": 0.1}, {"tokens": 5}, {"share": 0.2}, {"share": 1.0}):
        session.keep_of_turns(**options)  # type: ignore[arg-type]
        before = int(session.length[0, 0])
        session.prefill(text(3, 30))
        session.compress()
        kept.append(int(session.length[0, 0]) - before)
    assert kept == [SINKS + 3, 5, 6, 30]
    for wrong, words in (
        ({"tokens": 9}, "fewer Nexus rows than are asked for.*at most 8"),
        ({}, "one of both is given"),
        ({"share": 1.5}, "one of both is given"),
        ({"share": 0.5, "tokens": 3}, "one of both is given"),
    ):
        with pytest.raises(SemkvError, match=words):
            session.keep_of_turns(**wrong)  # type: ignore[arg-type]


def test_spread_rows_begin_as_tokens_that_a_cut_has_left(tiny_export: Path, tmp_path: Path):
    """Of a turn that was too long for the cache only the last tokens are there."""
    path = tiny_adapter_at(tiny_export, tmp_path / "a.safetensors", placement="spread")
    bundle = build_bundle(
        tiny_export / "decoder.onnx", tmp_path / "b", budgets=[BUDGET], method=Sonic(adapter=str(path), kept=0.2),
        weights="fp32", native="off",
    )  # fmt: skip
    session = open_session(bundle)
    session.keep_of_turns(tokens=8)
    tokens = text(1, 200)
    session.prefill(tokens)
    live = int(session.length[0, 0])
    left = session.slot_position[0][0, 0, SINKS:live].tolist()
    assert session.slots.columns["slot_token"][0][0, 0, SINKS:live].tolist() == [tokens[at] for at in left]
    # Room for the 8 may take more of them: what is left is what rows begin as.
    session.compress()
    assert session.length[0, 0] == SINKS + 8 and session.position[0] == 200
    began = session.slot_position[0][0, 0, SINKS : SINKS + 8].tolist()
    assert set(began) <= set(left) and began[:2] == [199, 198] and len(set(began)) == 8
    ids = session.slots.columns["slot_token"][0][0, 0, SINKS : SINKS + 8].tolist()
    assert ids == [VOCAB + row * VOCAB + tokens[at] for row, at in enumerate(began)]


def test_an_ended_turn_can_be_taken_back_until_the_next_begins(bundle: Bundle):
    session, other = open_session(bundle, budget=BUDGET), open_session(bundle, budget=BUDGET)
    for each in (session, other):
        each.prefill(text(1, 40))
        each.end_turn()
    before = snapshot(session)
    session.prefill(text(2, 30))
    session.step([7])
    session.end_turn()
    assert session.stats.runs == 1
    session.undo_turn()
    other.prefill([5])
    other.undo_turn()
    assert not same(before, snapshot(session)) and same(snapshot(other), snapshot(session))
    # An open turn is taken back as well, and the next one goes on as if it had not been.
    np.testing.assert_array_equal(session.prefill(text(4, 20)), other.prefill(text(4, 20)))
    with pytest.raises(SemkvError, match="no turn to take back"):
        open_session(bundle, budget=BUDGET).undo_turn()


def test_a_turn_that_was_cut_cannot_be_taken_back(bundle: Bundle):
    session = open_session(bundle, budget=BUDGET)
    session.prefill(text(1, 40))
    session.end_turn()
    session.prefill(text(2, 200))
    before = snapshot(session)
    with pytest.raises(SemkvError, match="something was compressed since it began"):
        session.undo_turn()
    assert same(before, snapshot(session))


def test_what_is_pinned_stays_through_every_overflow(bundle: Bundle):
    session = open_session(bundle, budget=BUDGET)
    session.prefill(text(1, 50))
    session.pin()
    session.prefill(text(2, 30))
    for turn in range(4):
        session.end_turn()
        session.prefill(text(turn, 70))
    assert session.slot_position[0][0, 0, :50].tolist() == list(range(50))
    with pytest.raises(SemkvError, match=r"capacity is too small for what is pinned.*at most 96 pinned slots of 128"):
        session.pin()
    lost = open_session(bundle, budget=BUDGET)
    lost.prefill(text(1, 200))
    with pytest.raises(SemkvError, match=r"capacity is too small for what is pinned.*got 200"):
        lost.pin()


def test_the_oldest_turns_go_first(bundle: Bundle):
    """Turns of eight rows until they fill the cache: whole turns leave, oldest first, and never a part of one."""
    session = open_session(bundle, budget=BUDGET)
    session.keep_of_turns(tokens=8)
    for turn in range(16):
        session.prefill(text(turn, 20))
        session.end_turn()
        assert session.length.max() <= 128
    column = session.slots.columns["slot_turn"][0][0, 0, : session.length[0, 0]]
    numbers, counts = np.unique(column[(column % 2 == 1)], return_counts=True)
    assert set(counts.tolist()) == {8}
    assert numbers.tolist() == [2 * turn + 1 for turn in range(15 - len(numbers), 15)] and 10 <= len(numbers) < 15


class Failing:
    """An engine whose run of a number is cut short."""

    def __init__(self, inner: Any, fail_at: int) -> None:
        self.inner, self.opened, self.batch, self.contract = inner, inner.opened, inner.batch, inner.contract
        self.read, self.write, self.reset, self.run_groups = inner.read, inner.write, inner.reset, inner.run_groups
        self.runs, self.fail_at = 0, fail_at

    def run(self, program: str, feeds: Any, *, row: int | None = None) -> Any:
        self.runs += 1
        if self.runs == self.fail_at:
            raise KeyboardInterrupt
        return self.inner.run(program, feeds, row=row)


@pytest.mark.parametrize("fail_at", [3, 4], ids=["the Nexus pass", "the first prompt after it"])
def test_an_interrupted_call_is_taken_back_and_can_be_made_again(fail_at: int, bundle: Bundle):
    session = Session(Failing(open_session(bundle, budget=BUDGET).engine, fail_at))  # type: ignore[arg-type]
    whole = open_session(bundle, budget=BUDGET)
    for each in (session, whole):
        each.prefill(text(1, 60))
        each.end_turn()
    with pytest.raises(KeyboardInterrupt):
        session.prefill(text(2, 20))
    np.testing.assert_array_equal(session.prefill(text(2, 20)), whole.prefill(text(2, 20)))
    assert same(snapshot(whole), snapshot(session))


def test_a_refused_prompt_leaves_the_turn_as_it_is(bundle: Bundle, adapter: Path):
    session = open_session(bundle, budget=BUDGET)
    session.prefill(text(1, 490))
    session.end_turn()
    before = snapshot(session)
    # 8 Nexus rows with positions of their own take some of the context as well.
    seen = 498 if load_adapter(adapter).placement == "appended" else 490
    with pytest.raises(
        SemkvError, match=rf"{513 - seen} more tokens do not fit the context.*got {seen} \+ {513 - seen}"
    ):
        session.prefill(text(2, 513 - seen))
    assert same(before, snapshot(session))
    session.prefill(text(2, 512 - seen))
    assert session.position[0] == 512


@pytest.mark.parametrize("ended", [True, False])
def test_a_saved_session_has_what_is_pending(ended: bool, bundle: Bundle, tmp_path: Path):
    session, whole = open_session(bundle, budget=BUDGET, batch=2), open_session(bundle, budget=BUDGET, batch=2)
    for each in (session, whole):
        for turn in range(2):
            each.prefill([text(turn, 40), text(9 - turn, 30)])
            each.end_turn()
        each.prefill([text(5, 21), []])
        if ended:
            each.end_turn(0)
    session.save(tmp_path / "s")
    again = open_session(bundle, budget=BUDGET, batch=2, state=tmp_path / "s")
    for each in (again, whole):
        each.prefill([text(6, 20), text(7, 20)])
        each.end_turn()
        each.prefill([text(7, 9), text(8, 9)])
    assert same(snapshot(whole), snapshot(again))
    session.reset()
    fresh = open_session(bundle, budget=BUDGET, batch=2)
    for each in (session, fresh):
        each.prefill([text(1, 40), text(2, 40)])
        each.end_turn()
        each.prefill([text(3, 9), text(4, 9)])
    assert same(snapshot(fresh), snapshot(session))


def test_other_methods_say_that_they_make_nothing_of_turns(tiny_bundle: Path):
    session = open_session(Bundle.open(tiny_bundle), budget=0.25)
    with pytest.raises(SemkvError, match=r"pins nothing.*--method importance"):
        session.pin()
    for call in (lambda: session.keep_of_turns(share=0.5), lambda: session.trim_turns(2)):
        with pytest.raises(SemkvError, match=r"makes nothing of turns.*--method sonic"):
            call()
    # Taking a turn back is every session's.
    session.prefill(text(1, 40))
    session.end_turn()
    before = snapshot(session)
    session.prefill(text(2, 30))
    session.undo_turn()
    assert same(before, snapshot(session))


def test_a_chat_pins_its_system_message(bundle: Bundle):
    """It stays when everything else went, and a chat whose message is refused has no trace of it."""
    from semkv_deploy.runtime.chat import Chat
    from semkv_deploy.runtime.tokens import load_tokenizer

    session, tokenizer = open_session(bundle, budget=BUDGET), load_tokenizer(bundle.root)
    chat = Chat(session, tokenizer, [1], "Answer in short sentences.")
    with pytest.raises(SemkvError, match="do not fit the context"):
        chat.say("word " * 600, max_new_tokens=4)
    assert session.position[0] == 0 == session.length.max()
    system = tokenizer.encode("<|im_start|>system\nAnswer in short sentences.<|im_end|>\n", add_special_tokens=False)
    for turn in range(6):
        chat.say(f"What is {turn} and {turn}?", max_new_tokens=12)
    column = session.slots.columns["slot_turn"][0][0, 0, : session.length[0, 0]]
    assert (column == -1).sum() == len(system) > 10
    assert session.slot_position[0][0, 0, : len(system)].tolist() == list(range(len(system)))

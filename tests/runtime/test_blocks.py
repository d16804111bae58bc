"""Blocks in a session: every slot knows its block, whatever pieces, rows, compressions and failures were before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle, calibrate_delimiters
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import DynSplit, StreamingLLM
from semkv_deploy.methods.behaviours import Blocks
from semkv_deploy.model.blocks import segment
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.session import Session
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.validate.run import validate

from .test_rows import same, snapshot
from .test_rows import text as words


@pytest.fixture(scope="module")
def bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("blocks") / "bundle"
    return build_bundle(tiny_export / "decoder.onnx", out, budgets=[0.25, 1.0], method=DynSplit(), weights="fp32")


def text(seed: int, count: int) -> list[int]:
    """Words with delimiters (13, 15) and turns (1) between them."""
    random = np.random.default_rng(seed)
    marks = random.choice([13, 15, 1, 300], count, p=[0.08, 0.04, 0.02, 0.86])
    return np.where(marks == 300, random.integers(20, 512, count), marks).tolist()


def blocks_of(session: Session, ids: list[int]) -> np.ndarray:
    """The number of each token's block, by the slow statement."""
    (rule,) = (each for each in session.contract.behaviours if isinstance(each, Blocks))
    lengths = segment(rule, ids, session.engine.opened.is_delimiter)
    return np.repeat(np.arange(len(lengths) + 1), [*lengths, len(ids) - sum(lengths)])


def check(session: Session, ids: list[list[int]]) -> None:
    """Every live slot has the number of its token's block."""
    for row, tokens in enumerate(ids):
        numbers = blocks_of(session, tokens)
        for group, live in enumerate(session.length[:, row]):
            held = (slice(None), slice(0, live))
            positions = session.slot_position[group][row][held]
            np.testing.assert_array_equal(session.slots.columns["slot_block"][group][row][held], numbers[positions])


def driven(session: Session, piece: int, check: Callable[[Session, list[list[int]]], None]) -> list[list[int]]:
    """Two rows of other lengths, prompts in pieces, steps in one of them or both; what each row has seen."""
    rows = [text(1, 230), text(2, 90)]
    for start in range(0, 230, piece):
        session.prefill([row[start : start + piece] for row in rows])
    check(session, rows)
    for token in (13, 40, 1, 50, 60):
        session.step([token, token + 1], np.array([True, token != 40]))
        rows[0].append(token)
        rows[1] += [token + 1] if token != 40 else []
    check(session, rows)
    return rows


@pytest.mark.parametrize("piece", [1, 7, 200])
def test_numbers_are_those_of_the_slow_statement(bundle: Bundle, piece: int):
    """Rows of other lengths, prompts in other pieces than the cache takes, steps, compressions, one more turn."""
    session = open_session(bundle, budget=0.25, batch=2)
    rows = driven(session, piece, check)
    session.compress(0)
    session.prefill([[], text(3, 80)])
    rows[1] += text(3, 80)
    check(session, rows)
    assert session.stats.runs > 1 and session.length.max() < len(rows[0])


def test_whole_blocks_stay_but_for_the_last(bundle: Bundle):
    """Between sinks and window, all but one of the blocks of which something stays are whole."""
    session, ids = open_session(bundle, budget=0.25), text(4, 128)
    session.prefill(ids)
    numbers = blocks_of(session, ids)
    session.compress()
    group = session.contract.cache.groups[0]
    room = session.contract.make_room
    assert room is not None and session.length[0, 0] == room.turn_share[0] * 128
    recent = max(int(room.recent_share * session.length[0, 0]), room.recent_least)
    assert recent < session.length[0, 0] - 4 or group.keep_slots
    for head in range(2):
        kept = session.slot_position[0][0, head, : session.length[0, 0]]
        middle = kept[(kept >= 4) & (kept < 128 - recent)]
        cut = [n for n in np.unique(numbers[middle]) if not set(np.flatnonzero(numbers == n)) <= set(kept.tolist())]
        assert len(cut) <= 1


class Failing:
    """An engine whose decoder fails at a run, after which it was not appended."""

    def __init__(self, inner: Any, at: int) -> None:
        self.inner, self.opened, self.batch, self.contract = inner, inner.opened, inner.batch, inner.contract
        self.read, self.write, self.reset, self.run_groups = inner.read, inner.write, inner.reset, inner.run_groups
        self.left = at

    def run(self, program: str, feeds: Any, *, row: int | None = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.inner.run(program, feeds, row=row)


def test_a_call_that_fails_leaves_no_block(bundle: Bundle):
    """The first pieces of the prompt closed blocks of tokens that were there before."""
    whole = open_session(bundle, budget=0.25)
    session = Session(Failing(open_session(bundle, budget=0.25).engine, 5))  # type: ignore[arg-type]
    for each in (session, whole):
        each.prefill(text(5, 30))
    before = snapshot(session)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(words(1, 60))
    assert same(before, snapshot(session))
    for each in (session, whole):
        each.prefill(text(6, 60))
    check(session, [text(5, 30) + text(6, 60)])
    assert same(snapshot(whole), snapshot(session))


def test_a_saved_session_goes_on_in_the_middle_of_a_block(bundle: Bundle, tmp_path: Path):
    session = open_session(bundle, budget=0.25, batch=2)
    session.prefill([text(7, 45), text(8, 61)])
    session.save(tmp_path / "s", row=1)
    other = open_session(bundle, budget=0.25)
    other.load(tmp_path / "s")
    for each, rows in ((other, [text(9, 40)]), (session, [[], text(9, 40)])):
        each.prefill(rows if len(rows) > 1 else rows[0])
    check(other, [text(8, 61) + text(9, 40)])
    assert other.behaviours[0].segmenters[0].state == session.behaviours[0].segmenters[1].state  # type: ignore[attr-defined]


def test_budget_one_cuts_nothing(bundle: Bundle):
    assert open_session(bundle, budget=1.0).behaviours == []


@pytest.mark.parametrize(
    "written",
    [
        "春天到了，河边的柳树发出了新芽。孩子们放风筝；老人们晒太阳。" * 4,
        "incomprehensibility" * 40,
        "\n\n\n;;;...\n" * 30,
    ],
    ids=["bytes", "one word", "delimiters"],
)
def test_texts_that_are_hard_to_cut(bundle: Bundle, written: str):
    """A tokenizer that spells characters in bytes, a word without an end, nothing but delimiters; and an empty turn."""
    session = open_session(bundle, budget=0.25)
    session.end_turn()
    ids = load_tokenizer(bundle.root).encode(written, add_special_tokens=False)[:400]
    session.prefill(ids)
    session.end_turn()
    session.end_turn()
    assert len(ids) > 128 and session.stats.runs > 0
    check(session, [ids])
    lengths = np.unique(blocks_of(session, ids), return_counts=True)[1]
    assert lengths[:-1].min() >= 12 and lengths.max() <= 20


def test_it_validates(bundle: Bundle):
    """Graphs, slots, block numbers and what is recorded against PyTorch."""
    report = validate(bundle.root, tokens=300)
    assert report.passed, [failure for result in report.results for failure in [result.failure] if failure]


@pytest.mark.parametrize("blocks", ["fixed", "delimiters"])
def test_blocks_without_weights_need_no_calibration(blocks: Any, tiny_export: Path, tmp_path: Path):
    method = DynSplit(blocks=blocks, block=8)
    built = build_bundle(tiny_export / "decoder.onnx", tmp_path / "b", budgets=[0.25], method=method, weights="fp32")
    session, ids = open_session(built, budget=0.25), text(4, 100)
    session.prefill(ids)
    check(session, [ids])
    assert built.manifest.calibration == {"table": None, "scores": None}
    lengths = np.unique(blocks_of(session, ids), return_counts=True)[1][:-1]
    assert set(lengths) == {8} if blocks == "fixed" else {6, 10} < set(range(6, 11)) and len(set(lengths)) > 1


def test_calibration_says_what_it_does_not_take(tiny_export: Path, tmp_path: Path):
    decoder = tiny_export / "decoder.onnx"
    with pytest.raises(SemkvError, match=r"--text code: too short to calibrate on \(expected 96 tokens or more.*got 1"):
        calibrate_delimiters(decoder, DynSplit(), {"prose": "word. " * 200, "code": "x"})
    with pytest.raises(SemkvError, match="--method streaming-llm: weighs no delimiters"):
        calibrate_delimiters(decoder, StreamingLLM())
    table = calibrate_delimiters(decoder, DynSplit(), {"any": "some words, and more of them; again. " * 30})
    assert [domain.name for domain in table.domains] == ["any"] and table.candidates[0] > 20
    build: Any = {"budgets": [0.25], "weights": "fp32", "method": DynSplit()}
    with pytest.raises(SemkvError, match=r"--calibration: .*another vocabulary \(expected 512 tokens, got 99\)"):
        build_bundle(decoder, tmp_path / "b", **build, calibration=table.model_copy(update={"vocab_size": 99}))
    with pytest.raises(SemkvError, match=r"--method-option domain=code: .*expected any"):
        build_bundle(decoder, tmp_path / "b", **{**build, "method": DynSplit(domain="code")}, calibration=table)
    assert not (tmp_path / "b").exists()
    built = build_bundle(decoder, tmp_path / "b", **build, calibration=table)
    (rule,) = (each for each in built.manifest.portable[0].behaviours if isinstance(each, Blocks))
    assert rule.domains == table.domains

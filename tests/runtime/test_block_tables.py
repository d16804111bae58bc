"""Block tables in a session: the decoder is told what the slow statement cuts, whatever pieces and failures were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import DynSplitSelect
from semkv_deploy.methods.representatives import reference
from semkv_deploy.model.blocks import segment
from semkv_deploy.runtime.behaviours.block_tables import BlockTabulator
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.session import Session

from .test_blocks import Failing, driven, text


@pytest.fixture(scope="module")
def bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """In standard operators; steps attend to 48 slots."""
    out = tmp_path_factory.mktemp("tables") / "bundle"
    method = DynSplitSelect(attend=48)
    return build_bundle(tiny_export / "decoder.onnx", out, budgets=[1.0], method=method, weights="fp32", native="off")


def check(session: Session, ids: list[list[int]]) -> None:
    """Ends of blocks, and representatives of those that are closed, are those of the whole text cut at once."""
    (tabulator,) = session.behaviours
    assert isinstance(tabulator, BlockTabulator)
    for row, tokens in enumerate(ids):
        lengths = np.array(segment(tabulator.behaviour, tokens, session.engine.opened.is_delimiter), np.int64)
        ends = np.cumsum(lengths)
        expected = np.zeros(tabulator.behaviour.most, np.int64)
        expected[: len(ends)] = ends
        expected[len(ends)] = len(tokens) if sum(lengths) < len(tokens) else 0
        np.testing.assert_array_equal(tabulator.ends[row], expected)
        where = (torch.from_numpy(each[None]) for each in (ends - lengths, lengths))
        keys = torch.from_numpy(session.engine.read("key", 1)[row : row + 1])
        found = session.engine.read("representatives", 1)[row, :, : len(ends)]
        np.testing.assert_array_equal(found, reference("min_max", keys, *where, 20)[0].numpy())


@pytest.mark.parametrize("piece", [1, 7, 200])
def test_tables_are_those_of_the_slow_statement(bundle: Bundle, piece: int):
    """Rows of other lengths, prompts in pieces, steps in one of them, a row that begins anew."""
    session = open_session(bundle, budget=1.0, batch=2)
    rows = driven(session, piece, check)
    session.reset(1)
    session.prefill([[], text(3, 50)])
    check(session, [rows[0], text(3, 50)])


def test_a_larger_cache_would_have_more_blocks(bundle: Bundle):
    with pytest.raises(SemkvError, match=r"a table of blocks has the size.*got 1024"):
        open_session(bundle, budget=1.0, capacity=1024)


def follow(session: Session) -> np.ndarray:
    """Logits of a prompt and of steps that choose among its blocks and those before."""
    return np.stack([session.prefill(text(6, 90)).copy(), *(session.step([t]).copy() for t in (13, 40, 50))])


def test_a_call_that_fails_leaves_no_block(bundle: Bundle):
    """The first pieces of the prompt closed blocks, which were mapped."""
    whole = open_session(bundle, budget=1.0)
    session = Session(Failing(open_session(bundle, budget=1.0).engine, 4))  # type: ignore[arg-type]
    for each in (session, whole):
        each.prefill(text(5, 110))
    with pytest.raises(KeyboardInterrupt):
        session.prefill(text(8, 400))
    np.testing.assert_array_equal(follow(session), follow(whole))
    check(session, [text(5, 110) + text(6, 90) + [13, 40, 50]])


def test_a_turn_that_is_taken_back_leaves_no_block(bundle: Bundle):
    session, whole = (open_session(bundle, budget=1.0) for _ in range(2))
    for each in (session, whole):
        each.prefill(text(5, 110))
        each.end_turn()
    session.prefill(text(8, 70))
    session.undo_turn()
    np.testing.assert_array_equal(follow(session), follow(whole))
    check(session, [text(5, 110) + text(6, 90) + [13, 40, 50]])


def test_a_saved_row_goes_on_in_the_middle_of_a_block(bundle: Bundle, tmp_path: Path):
    session, other = open_session(bundle, budget=1.0, batch=2), open_session(bundle, budget=1.0)
    session.prefill([text(7, 45), text(8, 161)])
    session.save(tmp_path / "s", row=1)
    other.load(tmp_path / "s")
    for token in (13, 40, 50, 60):
        ours, theirs = other.step([token]), session.step([5, token])
        np.testing.assert_allclose(ours[0], theirs[1], atol=1e-4)
    check(other, [[*text(8, 161), 13, 40, 50, 60]])

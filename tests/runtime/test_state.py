"""Saved sessions: what is continued is what was saved, and nothing else is taken."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Method
from semkv_deploy.model.cache_groups import one_a_head
from semkv_deploy.runtime.open import larger, open_session
from semkv_deploy.runtime.state import read_note
from tests.tiny import with_adapter

from ..methods.matrix import FORMS
from .test_rows import same, snapshot, text


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def rewrite(path: Path, change: Any, **metadata: str) -> None:
    """The file again, with its tensors or metadata changed and everything else as it was."""
    with safe_open(str(path), framework="numpy") as file:
        known = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {**known, **metadata})


@pytest.mark.parametrize(
    "name",
    [
        "semanticache, by head, at turns",
        "streaming-llm",
        "importance, fitted",
        "dynsplit",
        "dynsplit-select",
        "sonic",
        "full",
    ],
)
@pytest.mark.parametrize("groups", [None, one_a_head(2, 2)], ids=["by layer", "by head"])
def test_a_continued_session_gives_the_same_tokens(name: str, groups: Any, tiny_export: Path, tmp_path: Path):
    """Three turns, saved after each; the session that goes on is a new one each time."""
    method: Method = with_adapter(FORMS[name], tiny_export)
    decoder = str(tiny_export / "decoder.onnx")
    built = build_bundle(decoder, tmp_path / "b", budgets=[0.5], method=method, groups=groups, weights="fp32")
    whole, path = open_session(built, batch=2), None
    for turn in range(3):
        prompts = [text(turn, 90 if method.compresses else 60), text(9 - turn, 20)]
        pieces = open_session(built, batch=2, state=path)
        if path is not None:
            assert same(snapshot(whole), snapshot(pieces))
        assert pieces.generate(prompts, max_new_tokens=9) == whole.generate(prompts, max_new_tokens=9)
        for session in (whole, pieces):
            session.end_turn()
        path = tmp_path / f"turn{turn}.safetensors"
        pieces.save(path)
    assert whole.stats.runs > 0 or not method.compresses
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")) == []


@pytest.mark.parametrize("name", ["streaming-llm", "semanticache", "importance, fitted", "dynsplit"])
def test_what_was_read_in_a_larger_cache_goes_on_in_the_budgets(name: str, tiny_export: Path, tmp_path: Path):
    decoder, path = str(tiny_export / "decoder.onnx"), tmp_path / "read.safetensors"
    built = build_bundle(
        decoder, tmp_path / "b", budgets=[0.25], method=FORMS[name], budget_by="uniform", weights="fp32"
    )
    reader = open_session(built, capacity=512)
    reader.prefill(text(1, 300))
    assert (reader.length == 300).all() and reader.stats.runs == 0
    reader.save(path)
    with pytest.raises(SemkvError, match=r"holds more slots than the caches \(expected at most 128, got 300\)"):
        open_session(built, state=path)
    reader.compress()
    assert (reader.length <= 300 // 4).all() and reader.stats.runs > 0
    reader.save(path)
    session = open_session(built, state=path)
    assert session.generate(text(2, 20), max_new_tokens=9) == reader.generate(text(2, 20), max_new_tokens=9)
    assert same(snapshot(session), snapshot(reader))


def test_a_larger_cache_is_larger_and_has_shapes_to_be_chosen(bundle: Bundle):
    with pytest.raises(SemkvError, match=r"less than the budget's \(expected 128 slots or more, got 64\)"):
        open_session(bundle, budget=0.25, capacity=64)
    static = bundle.built("onnxruntime-cpu", 0.25)
    static = replace(static, contract=static.contract.model_copy(update={"batch": 1}))
    with pytest.raises(SemkvError, match="graphs of static shapes have the capacity that they were built with"):
        larger(static, 512)


def test_one_row_moves_to_another_place(bundle: Bundle, tmp_path: Path):
    """Of a batch to a row of another batch, whose other rows stay."""
    source, target = open_session(bundle, budget=0.25, batch=2), open_session(bundle, budget=0.25, batch=3)
    source.prefill([text(1, 30), text(2, 150)])
    target.prefill([text(3, 20), text(4, 90), text(5, 40)])
    before = snapshot(target)
    source.save(tmp_path / "row", row=1)
    target.load(tmp_path / "row", row=2)
    after = snapshot(target)
    assert all(np.array_equal(before[name], after[name]) for name in before if name.endswith((".0", ".1")))
    logits = target.step([7, 7, 7], np.array([False, False, True]))[2].copy()
    np.testing.assert_allclose(logits, source.step([7, 7], np.array([False, True]))[1], atol=1e-4)
    with pytest.raises(SemkvError, match=r"of another number of rows \(expected 3, got 1\)"):
        target.load(tmp_path / "row")
    with pytest.raises(SemkvError, match="no such row"):
        target.load(tmp_path / "row", row=3)


def test_the_file_holds_live_slots_only(bundle: Bundle, tmp_path: Path):
    session = open_session(bundle, budget=1.0)
    session.prefill(text(1, 10))
    session.save(tmp_path / "state")
    tensors = load_file(tmp_path / "state")
    assert tensors["buffer.key.01"].shape == (1, 2, 10, 16) and tensors["column.slot_position.00"].shape == (1, 1, 10)
    assert (tmp_path / "state").stat().st_size < 20_000


def halves(tensors: dict[str, Any]) -> None:
    tensors["length"] = tensors["length"] // 2


CHANGES: dict[str, tuple[Any, dict[str, str], str]] = {
    "another bundle": (lambda tensors: None, {"bundle": "0" * 64}, "of another bundle"),
    "another budget": (lambda tensors: None, {"budget": "0.5"}, r"of another budget \(expected 0\.25, got 0\.5\)"),
    "another target": (lambda tensors: None, {"target": "tensorrt"}, "of another target"),
    "another version": (lambda tensors: None, {"version": "0"}, "of another version of the file"),
    "another format": (lambda tensors: None, {"format": "pt"}, "of another kind of file"),
    "a number changed": (lambda tensors: tensors["buffer.key.00"].__setitem__((0, 0, 0, 0), 9), {}, "is damaged"),
    "lengths changed": (halves, {}, "is damaged"),
    "a tensor gone": (lambda tensors: tensors.pop("chunk"), {}, "is damaged"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_taken(name: str, bundle: Bundle, tmp_path: Path):
    change, metadata, words = CHANGES[name]
    session = open_session(bundle, budget=0.25)
    session.prefill(text(1, 40))
    session.save(tmp_path / "state")
    rewrite(tmp_path / "state", change, **metadata)
    before = snapshot(session)
    with pytest.raises(SemkvError, match=f"state: the saved session .*{words}"):
        session.load(tmp_path / "state")
    assert same(before, snapshot(session))


@pytest.mark.parametrize("name", ["length beyond capacity", "length beyond position", "position beyond context"])
def test_what_no_session_can_have_been(name: str, bundle: Bundle, tmp_path: Path):
    """With a checksum that fits, as one who forges a file writes it."""
    from semkv_deploy.runtime.state import _digest

    session = open_session(bundle, budget=0.25)
    session.prefill(text(1, 40))
    session.save(tmp_path / "state")
    tensors = load_file(tmp_path / "state")
    if name == "length beyond capacity":
        tensors["length"][:] = 129
        tensors["position"][:] = 200
    elif name == "length beyond position":
        tensors["position"][:] = 39
    else:
        tensors["position"][:] = 513
    rewrite(tmp_path / "state", lambda kept: kept.update(tensors), sha256=_digest(tensors))
    words = "holds more slots than the caches" if name == "length beyond capacity" else "does not fit the contract"
    with pytest.raises(SemkvError, match=f"the saved session {words}"):
        session.load(tmp_path / "state")


def test_damaged_files(bundle: Bundle, tmp_path: Path):
    session = open_session(bundle, budget=0.25)
    session.prefill(text(1, 40))
    path = tmp_path / "state"
    session.save(path)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:7], b"\xff" * 64, json.dumps({}).encode()):
        path.write_bytes(content)
        with pytest.raises(SemkvError, match="state: not a saved session, or a damaged one"):
            session.load(path)
    with pytest.raises(SemkvError, match="no such file"):
        session.load(tmp_path / "absent")
    with pytest.raises(SemkvError, match="cannot be written"):
        session.save(tmp_path / "absent" / "state")


def test_a_bundle_that_was_moved_takes_its_sessions(bundle: Bundle, tiny_bundle: Path, tmp_path: Path):
    session = open_session(bundle, budget=0.5)
    session.prefill(text(1, 40))
    session.save(tmp_path / "state")
    shutil.copytree(tiny_bundle, tmp_path / "moved")
    again = open_session(Bundle.open(tmp_path / "moved"), budget=0.5, state=tmp_path / "state")
    np.testing.assert_array_equal(again.step([5]), session.step([5]))


def test_a_note_is_kept_beside_the_conversation(bundle: Bundle, tmp_path: Path):
    session, path = open_session(bundle, budget=0.25), tmp_path / "noted.safetensors"
    session.prefill(text(1, 30))
    session.save(path, note="\u00e9 {}")
    assert read_note(session, path) == "\u00e9 {}" and open_session(bundle, budget=0.25, state=path).position[0] == 30
    session.save(path)
    assert read_note(session, path) == ""
    with pytest.raises(SemkvError, match="of another budget"):
        read_note(open_session(bundle, budget=0.5), path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SemkvError, match="not a saved session, or a damaged one"):
        read_note(session, path)

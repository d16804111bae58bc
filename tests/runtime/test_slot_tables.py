"""Slot tables in a session: of an evicted cache each head's blocks are tabled, mapped and chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from contract_host import Host
from hypothesis import given, settings
from hypothesis import strategies as st

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import DynSplit
from semkv_deploy.methods.block_tables import most_joined
from semkv_deploy.methods.representatives import reference
from semkv_deploy.model.cache_groups import CacheGroup
from semkv_deploy.runtime.behaviours.slot_tables import SlotTabulator, block_ends
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.session import Session
from semkv_deploy.validate.run import validate

from .test_blocks import Failing, driven, text

FEW, ALL, BLOCK = 40, 512, 8


@pytest.fixture(scope="module")
def bundles(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """One that attends to what stayed, one that may choose all of it, one that chooses few; no native operators."""
    folder, found = tmp_path_factory.mktemp("slot_tables"), {}
    for name, attend in (("plain", None), ("all", ALL), ("few", FEW)):
        method = DynSplit(attend=attend, block=BLOCK, recent_blocks=1)
        options = {"budgets": [0.25], "weights": "fp32", "native": "off"}
        found[name] = build_bundle(tiny_export / "decoder.onnx", folder / name, method=method, **options)
    return found


def slow_ends(numbers: list[int], join: int) -> list[int]:
    """The rule, slot by slot."""
    runs: list[list[int]] = []
    for slot, number in enumerate(numbers):
        if slot and numbers[slot - 1] == number:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    blocks: list[list[int]] = []
    for n, run in enumerate(runs):
        if blocks and n < len(runs) - 1 and len(blocks[-1]) + len(run) <= join:
            blocks[-1] += run
        else:
            blocks.append(run)
    return [block[-1] + 1 for block in blocks]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(4, 16))
def test_every_slot_is_in_one_block_of_bounded_length(lengths: list[int], join: int):
    """Whatever was cut; there are never more than the table has rows for."""
    numbers = np.repeat(np.arange(len(lengths)) * 2, lengths)
    ends = block_ends(numbers, join)
    assert ends.tolist() == slow_ends(numbers.tolist(), join)
    found = np.diff(ends, prepend=0)
    assert (found > 0).all() and found.sum() == len(numbers)
    assert (found <= max([*lengths, join, 1])).all()
    group = CacheGroup(layer=0, heads=(0,), capacity=max(len(numbers), 1), keep_slots=1)
    assert len(ends) < most_joined((group,), join)


def check(session: Session, ids: list[list[int]]) -> None:
    """Ends, and representatives of all blocks but each head's last, are the slow statement's of its own slots."""
    tabulator = session.behaviours[-1]
    assert isinstance(tabulator, SlotTabulator)
    heads = 0
    for group, of in enumerate(session.contract.cache.groups):
        for row, head in np.ndindex(len(ids), len(of.heads)):
            live = session.length[group, row]
            numbers = session.slots.columns["slot_block"][group][row, head, :live].tolist()
            ends = np.array(slow_ends(numbers, BLOCK), np.int64)
            found = tabulator.ends[row, heads + head]
            np.testing.assert_array_equal(found[found > 0], ends)
            where = [
                torch.from_numpy(each[None, :-1]) for each in (np.pad(ends, (1, 0))[:-1], np.diff(ends, prepend=0))
            ]
            keys = torch.from_numpy(session.engine.read("key", group)[row : row + 1, head : head + 1])
            table = session.engine.read("representatives", group)[row, head, : len(ends) - 1]
            np.testing.assert_array_equal(table, reference("min_max", keys, *where, 10)[0, 0].numpy())
        heads += len(of.heads)


@pytest.mark.parametrize("piece", [1, 7, 200])
def test_tables_are_those_of_the_slow_statement(bundles: dict[str, Bundle], piece: int):
    """Rows of other lengths, pieces, steps, compressions of their own accord and asked for, a row that begins anew."""
    session = open_session(bundles["few"], budget=0.25, batch=2)
    rows = driven(session, piece, check)
    assert session.stats.runs > 1
    heads = session.slots.columns["slot_position"][0][0, :, : session.length[0, 0]]
    assert (heads[0] != heads[1]).any(), "heads kept the same: nothing is shown"
    session.compress(0)
    check(session, rows)
    session.reset(1)
    session.prefill([[], text(3, 50)])
    check(session, [rows[0], text(3, 50)])


def follow(session: Session) -> np.ndarray:
    """Logits of a prompt that does not fit, and of steps."""
    steps = (13, 40, 50, *range(60, 80))
    return np.stack([session.prefill(text(6, 230)).copy(), *(session.step([t]).copy() for t in steps)])


def test_as_many_slots_as_there_are_is_attention_to_what_stayed(bundles: dict[str, Bundle]):
    """The same slots stay, and logits are the same; few slots are not the same."""
    sessions = {name: open_session(bundle, budget=0.25) for name, bundle in bundles.items()}
    logits = {name: follow(session) for name, session in sessions.items()}
    np.testing.assert_allclose(logits["all"], logits["plain"], atol=1e-3)
    for ours, theirs in zip(sessions["all"].slot_position, sessions["plain"].slot_position, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.abs(logits["few"] - logits["plain"]).max() > 1e-2
    tokens = [open_session(bundles[name], budget=0.25).generate(text(8, 200), max_new_tokens=30) for name in bundles]
    assert tokens[0] == tokens[1]


def test_it_validates(bundles: dict[str, Bundle]):
    """Lowered against portable: logits, caches, representatives, columns."""
    assert validate(bundles["few"].root, tokens=250).passed


def test_a_host_of_the_contract_alone_does_the_same(bundles: dict[str, Bundle]):
    session, host = (
        open_session(bundles["few"], budget=0.25, batch=2),
        Host(bundles["few"].root, "onnxruntime-cpu", batch=2),
    )
    for turn in range(3):
        prompts = [text(turn, 90), text(9 - turn, 41)]
        expected = session.prefill(prompts)
        np.testing.assert_array_equal(np.stack([host.prompt(row, ids) for row, ids in enumerate(prompts)]), expected)
        for token in range(20):
            tokens, wanted = np.array([token + 20, 13]), [True, token % 3 > 0]
            ours, theirs = session.step(tokens, np.array(wanted)), host.step(tokens, wanted)
            np.testing.assert_array_equal(theirs[wanted], ours[wanted])
    assert session.stats.runs > 1
    np.testing.assert_array_equal(host.length, session.length)


def test_a_call_that_fails_leaves_no_block(bundles: dict[str, Bundle]):
    whole = open_session(bundles["few"], budget=0.25)
    session = Session(Failing(open_session(bundles["few"], budget=0.25).engine, 5))  # type: ignore[arg-type]
    for each in (session, whole):
        each.prefill(text(5, 30))
    with pytest.raises(KeyboardInterrupt):
        session.prefill(text(1, 60))
    for each in (session, whole):
        each.prefill(text(6, 20))
    check(session, [text(5, 30) + text(6, 20)])
    np.testing.assert_array_equal(follow(session), follow(whole))


def test_a_saved_session_goes_on(bundles: dict[str, Bundle], tmp_path: Path):
    session = open_session(bundles["few"], budget=0.25)
    follow(session)
    session.save(tmp_path / "s")
    other = open_session(bundles["few"], budget=0.25, state=tmp_path / "s")
    for token in range(20):
        np.testing.assert_array_equal(session.step([token + 9]), other.step([token + 9]))
        check(other, [[]])


def test_a_larger_cache_would_have_more_blocks(bundles: dict[str, Bundle]):
    with pytest.raises(SemkvError, match=r"a table of blocks has the size.*got 1024"):
        open_session(bundles["few"], budget=0.25, capacity=1024)

"""Rows, positions and masks: tensors against the statement in loops."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.spread import rank_of, spread_order
from semkv_deploy.train import reference
from semkv_deploy.train.layout import PAD, Batch, Dialogue, batch_of, causal, counts_for, sight, window
from tests.train.conftest import random_dialogue

SIZES = st.tuples(st.integers(0, 3), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=2, max_size=4))


def made(pinned: int, turns: list[tuple[int, int]]) -> tuple[Dialogue, list[int]]:
    return random_dialogue(0, tuple(length for length, _ in turns), pinned), [count for _, count in turns[:-1]]


def in_memory(batch: Batch, row: int, rows: list[reference.Row]) -> list[int]:
    """Where the rows in true order lie in the batch: text rows first, then Nexus rows."""
    text, nexus = iter(range(batch.ids.shape[1])), iter(range(batch.ids.shape[1], 10_000))
    return [next(text if each.kind == "text" else nexus) for each in rows]


@given(
    st.lists(SIZES, min_size=1, max_size=2),
    st.sampled_from(["causal", "full"]),
    st.sampled_from(["appended", "spread"]),
    st.lists(st.integers(4, 40), unique=True),
)
@settings(max_examples=50, deadline=None)
def test_masks_and_positions_are_those_of_the_statement(sizes, corner, placement, common):
    dialogues = [made(*each) for each in sizes]
    if placement == "spread":  # no more rows than tokens to begin as
        dialogues = [
            (dialogue, [min(count, len(body)) for count, body in zip(counts, dialogue.turns, strict=False)])
            for dialogue, counts in dialogues
        ]
    all_counts = [counts for _, counts in dialogues]
    batch = batch_of([dialogue for dialogue, _ in dialogues], all_counts, placement, rank_of(common))
    whole, stream = sight(batch, corner).whole, window(batch)
    positions = torch.cat((batch.position, batch.nexus_position), 1)
    for number, (dialogue, counts) in enumerate(dialogues):
        rows = reference.rows_of(dialogue, counts, placement, common)
        place = in_memory(batch, number, rows)
        expected = torch.zeros_like(whole[number])
        for query, at in zip(rows, place, strict=True):
            assert positions[number, at] == query.position
            if query.kind == "nexus":
                assert batch.nexus_token[number, at - batch.ids.shape[1]] == query.token
            for key, there in zip(rows, place, strict=True):
                expected[at, there] = reference.sees(query, key, corner)
                if query.kind == key.kind == "text":
                    assert stream[number, at, there] == reference.streaming_sees(rows, query, key)
        for row in set(range(len(expected))) - set(place):
            expected[row, row] = True
        assert torch.equal(whole[number], expected)


def test_what_fills_up_is_seen_by_nobody_else_and_sees_itself():
    short, long = random_dialogue(1, (3, 2)), random_dialogue(2, (5, 6, 4))
    batch = batch_of([short, long], [[1], [2, 3]])
    turns = torch.cat((batch.turn, batch.nexus_turn), 1)
    for mask, of in ((sight(batch).whole, turns), (causal(batch), batch.turn), (window(batch), batch.turn)):
        filling = of == PAD
        assert filling[0].any() and mask.any(-1).all()
        others = mask & ~torch.eye(mask.shape[1], dtype=torch.bool)
        assert not others.transpose(1, 2)[filling].any()


def test_targets_are_the_next_tokens_and_answers_are_marked_where_they_are_predicted():
    dialogue = Dialogue((10, 11), ((12, 13), (14, 15, 16, 17)), answers=((1, 2, 4),))
    batch = batch_of([dialogue], [[1]])
    assert batch.target[0].tolist() == [11, 12, 13, 14, 15, 16, 17, -1]
    assert batch.answer[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 0]
    assert batch.position[0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and batch.nexus_position[0].tolist() == [4]


def test_no_history_is_no_window():
    batch = batch_of([random_dialogue(3)], [[2, 2]])
    dropped = window(batch, history=False)
    assert torch.equal(dropped, sight(batch).text_text) and (window(batch) & ~dropped).any()


def test_spread_rows_are_nested_and_half_of_them_are_the_last_tokens():
    assert spread_order(range(8)) == [7, 6, 3, 5, 4, 1, 2, 0]
    assert spread_order(range(1)) == [0] and spread_order(()) == []
    for length in range(1, 70):
        order = spread_order(range(length))
        assert sorted(order) == list(range(length))
        few = order[: max(2, length // 4)]
        assert set(range(length - len(few) // 2, length)) <= set(few)
        # No stretch is left out: of the rest, every eighth of the turn has its share.
        if length >= 64:
            assert {token * 8 // length for token in few} == set(range(8))
    with pytest.raises(SemkvError, match="a number of Nexus rows for each finished one"):
        batch_of([random_dialogue(0, (3, 5))], [[4]], "spread")


def test_between_the_last_tokens_come_the_rarest_and_of_them_evenly_spread_ones():
    rank = rank_of([7, 5])  # 7 is said most
    assert spread_order([5, 1, 7, 1, 7, 5], rank) == [5, 1, 4, 3, 2, 0]
    assert spread_order([7, 7, 7, 7], rank) == spread_order(range(4))
    for seed in range(20):
        draw = random.Random(seed)
        tokens = [draw.randrange(40) for _ in range(draw.randint(1, 60))]
        common = draw.sample(range(40), 20)
        order = spread_order(tokens, rank_of(common))
        assert sorted(order) == list(range(len(tokens)))
        rare = [place for place in order if tokens[place] not in common]
        # Of the first 2 n rows n or more are rare, as long as there are such.
        assert set(rare) <= set(order[: 2 * len(rare)])


def test_counts_are_shares_rounded_up_within_what_there_is():
    assert counts_for([10, 11, 400, 1], 0.2, 64) == [2, 3, 64, 1]


@pytest.mark.parametrize("counts", [[], [1], [1, 0], [1, 1, 1]])
def test_counts_that_do_not_fit_the_turns(counts):
    with pytest.raises(SemkvError, match="a dialogue needs two turns at least, and a number of Nexus rows"):
        batch_of([random_dialogue(0)], [counts])

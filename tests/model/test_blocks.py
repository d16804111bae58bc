"""Where a text is cut into blocks: bounds, boundaries, and that pieces and what comes later change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from semkv_deploy.model.blocks import BlockRule, DomainWeights, Segmenter, SegmenterState, segment

VOCABULARY = 12
TURN_ID, LISTED, OTHER, WORD = 0, (1, 2, 3), 4, 9
"""Token ids: a turn's marker, delimiters with weights of their own, one without, and no delimiter."""

IS_DELIMITER = np.isin(np.arange(VOCABULARY), [TURN_ID, *LISTED[:2], OTHER])
"""The third of `LISTED` is none by the tokenizer's rule, such as a bracket, and has a weight all the same."""


def domains(*weights: tuple[int, ...]) -> tuple[DomainWeights, ...]:
    """One for each list of weights, of `LISTED` and of others; delimiter n is what domain n has most of."""
    return tuple(
        DomainWeights(name=f"d{n}", weights=each, log_shares=tuple(-100 if k == n else -3000 for k in range(4)))
        for n, each in enumerate(weights)
    )


def rule(base: int = 16, search: int = 4, **given: Any) -> BlockRule:
    table = {"turn_ids": (TURN_ID,), "token_ids": LISTED, "domains": domains((2000, 0, 500, -100))}
    return BlockRule(base=base, search=search, **{**table, **given})


def lengths(rule: BlockRule, pieces: list[list[int]]) -> tuple[list[int], SegmenterState]:
    """Of the blocks that a growing text closes, piece by piece."""
    segmenter = Segmenter(rule, rule.codes(IS_DELIMITER))
    found = [length for piece in pieces for length in segmenter.append(np.array(piece, np.int64))]
    return found, segmenter.state


RULES = st.builds(
    lambda base, quarter, nearness, rows, number: rule(
        base,
        base * quarter // 16,
        nearness=nearness,
        domains=domains(*rows),
        domain=None if number is None else number % len(rows) if rows else None,
        **({} if rows else {"token_ids": ()}),
    ),
    st.integers(4, 40),
    st.integers(0, 4),
    st.integers(0, 2000),
    st.lists(st.tuples(*[st.integers(-4000, 4000)] * 4), max_size=3),
    st.none() | st.integers(0, 2),
)
TEXTS = st.lists(st.lists(st.sampled_from([TURN_ID, *LISTED, OTHER, *[WORD] * 8]), max_size=60), max_size=6)


@settings(max_examples=300, deadline=None)
@given(RULES, TEXTS)
def test_every_token_is_in_one_block_of_bounded_length_however_the_text_comes(rule: BlockRule, pieces: list[list[int]]):
    text = [token for piece in pieces for token in piece]
    found, state = lengths(rule, pieces)
    assert found == segment(rule, text, IS_DELIMITER)
    assert found == lengths(rule, [[token] for token in text])[0]
    assert sum(found) + len(state.open) == len(text) and state.closed == len(found)
    assert all(rule.base - rule.search <= length <= rule.base + rule.search for length in found)
    assert len(state.open) < rule.base + rule.search
    # Blocks that are closed stay as they are, whatever comes.
    for cut in range(0, len(text), 17):
        before = segment(rule, text[:cut], IS_DELIMITER)
        assert found[: len(before)] == before


def text(count: int, **at: int) -> list[int]:
    """Words, with tokens at some positions (`_15=1`: token 1 is the 16th)."""
    ids = [WORD] * count
    for place, token in at.items():
        ids[int(place[1:])] = token
    return ids


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (text(20), 16),  # no delimiter: the cut is hard
        (text(20, _3=1, _10=1), 16),  # too early for the window
        (text(20, _11=2), 12),
        (text(20, _19=2), 20),
        (text(20, _11=2, _18=1), 19),  # weighs most
        (text(20, _13=1, _17=1), 14),  # as far and as heavy: the first
        (text(20, _12=1, _16=1), 17),  # as heavy: the nearest
        (text(20, _14=3, _15=2), 15),  # a bracket with a weight
        (text(20, _14=OTHER), 15),
        (text(20, _12=TURN_ID, _13=1), 13),  # a turn's end is stronger than any weight
        (text(14, _12=TURN_ID), 13),  # and needs no look ahead
        (text(20, _10=TURN_ID), 16),  # but no block is shorter than the least
    ],
)
def test_where_a_block_ends(ids: list[int], expected: int):
    assert lengths(rule(), [ids])[0][:1] == [expected]


def test_distance_costs_what_nearness_says():
    ids = text(20, _15=2, _18=1)
    # In units of 1/search: 2000 x 4 against 3 x nearness.
    assert lengths(rule(nearness=2666), [ids])[0] == [19] and lengths(rule(nearness=2667), [ids])[0] == [16]


def test_the_domain_is_that_of_the_delimiters_so_far():
    first, second = (3000, 0, 0, 0), (0, 3000, 0, 0)
    ids = text(20, _12=LISTED[0], _13=LISTED[1])
    both = rule(domains=domains(first, second))
    assert (
        lengths(both, [[LISTED[1]] * 12 + ids])[0][1:] == [14] or lengths(both, [[LISTED[1]] * 16 + ids])[0][-1] == 14
    )
    assert lengths(both, [[LISTED[0]] * 16 + ids])[0][-1] == 13
    # As likely: the first; or what was asked for.
    assert lengths(both, [ids])[0] == [13] and lengths(rule(domains=domains(first, second), domain=1), [ids])[0] == [14]


@pytest.mark.parametrize(
    "ids", [[], [WORD] * 2000, [TURN_ID] * 100, [OTHER] * 100], ids=["nothing", "one word", "turns", "marks"]
)
def test_texts_that_are_no_texts(ids: list[int]):
    """An enormous word, and nothing but delimiters."""
    found, state = lengths(rule(), [ids])
    assert sum(found) + len(state.open) == len(ids)
    assert set(found) <= ({16} if ids[:1] == [WORD] else {12, 16})


def test_without_domains_every_cut_is_hard():
    """Blocks of a fixed length, though the text has delimiters and turns."""
    fixed = BlockRule(base=8, search=0, turn_ids=(TURN_ID,))
    assert lengths(fixed, [[OTHER, TURN_ID, WORD] * 8])[0] == [8, 8, 8]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"search": 5}, "search is at most a quarter of base"),
        ({"domains": (DomainWeights(name="d", weights=(1,), log_shares=(1, 2, 3, 4)),)}, "a weight and a log share"),
        ({"domain": 1}, "domain is the number of a domain"),
    ],
)
def test_rules_that_cannot_be_are_refused(change: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        rule(**change)

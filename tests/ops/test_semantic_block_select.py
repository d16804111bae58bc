"""SemanticBlockSelect: all implementations against each other, the rules of the choice, and what it is for: attention.

Scores of most cases are small integers, which every implementation sums exactly: decisions then cannot differ by a
rounding error, and equal scores are common.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import nexus_attention, semantic_block_map, semantic_block_select
from semkv_deploy.ops.semantic_block_select import block_scores

from .conftest import Implementation, assert_agree, implementations

reference: Implementation = semantic_block_select.reference
ALL = sorted(implementations(semantic_block_select))
LONGEST = 6


def table(lengths: list[list[int]], gap: int = 0, longest: int = LONGEST) -> Tensor:
    """[B,N,longest]: blocks one behind the other, `gap` slots between."""
    slots = torch.full((len(lengths), len(lengths[0]), longest), -1)
    for b, row in enumerate(lengths):
        start = b
        for n, length in enumerate(row):
            slots[b, n, :length] = torch.arange(start, start + length)
            start += length + gap
    return slots


def make_inputs(
    lengths: list[list[int]],
    counts: list[int] | None = None,
    pins: list[list[int]] | None = None,
    heads: tuple[int, int] = (4, 2),
    rows: int = 1,
    vectors: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """Queries and representatives of small integers; smallest <= largest."""
    generator = torch.Generator().manual_seed(seed)
    batch, blocks = len(lengths), len(lengths[0])
    query = torch.randint(-2, 3, (batch, heads[0], rows, 4), generator=generator).to(dtype)
    shape = (batch, heads[1], blocks, vectors, 4)
    representatives = torch.randint(-2, 3, shape, generator=generator).sort(3).values.to(dtype)
    pinned = torch.zeros(batch, blocks, dtype=torch.int64)
    for b, row in enumerate(pins or []):
        pinned[b, row] = torch.tensor([1, -7, 2**40])[torch.arange(len(row)) % 3]
    return [query, representatives, table(lengths, gap=seed % 3), torch.tensor(counts or [blocks] * batch), pinned]


def published_scores(inputs: list[Tensor], b: int, h: int, reduce_max: int = 0) -> list[float]:
    """Scores written out term by term."""
    query, representatives = inputs[:2]
    group = query.shape[1] // representatives.shape[1]
    rows = [q.tolist() for head in query[b, h * group : (h + 1) * group].double() for q in head]
    scores = []
    for block in representatives[b, h].double().tolist():
        by_row = [sum(max(q * vector[d] for vector in block) for d, q in enumerate(row)) for row in rows]
        scores.append(max(by_row) if reduce_max else sum(by_row))
    return scores


def margin(inputs: list[Tensor], reduce_max: int = 0) -> float:
    """The smallest distance between two scores of one head."""
    smallest = math.inf
    for b in range(inputs[0].shape[0]):
        for h in range(inputs[1].shape[1]):
            scores = sorted(published_scores(inputs, b, h, reduce_max))
            smallest = min(smallest, *(high - low for low, high in itertools.pairwise(scores)))
    return smallest


def slots_of(inputs: list[Tensor], b: int, n: int) -> list[int]:
    return [s for s in inputs[2][b, n].tolist() if s >= 0]


RAGGED = [[5, 0, 6, 1, 0, 3, 2, 4], [1, 1, 2, 3, 6, 6, 2, 1], [0] * 8, [6] * 8]
WIDTHS = (1, 7, 20, 48, 61)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("vectors", "reduce_max"), [(2, 0), (2, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(("heads", "rows"), [((1, 1), 1), ((6, 2), 1), ((6, 2), 3), ((3, 3), 2)])
def test_implementations_agree(
    heads: tuple[int, int], rows: int, vectors: int, reduce_max: int, dtype: torch.dtype
) -> None:
    """Ragged, empty and full rows, unused blocks, pins, ties; narrower than one block and wider than everything."""
    inputs = make_inputs(
        RAGGED, [8, 6, 8, 7], [[0, 1, 7], [5], [0], [2, 7]], heads, rows, vectors, dtype, seed=heads[0] + rows
    )
    for width in WIDTHS:
        (slots,) = assert_agree(semantic_block_select, inputs, 0.0, width=width, reduce_max=reduce_max)
        assert slots.shape == (4, heads[1], width)
        used = [sum(row[:count]) for row, count in zip(RAGGED, inputs[3].tolist(), strict=True)]
        assert (slots >= 0).sum(-1).tolist() == [[min(width, n)] * heads[1] for n in used]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, LONGEST), min_size=1, max_size=9),
    count=st.integers(0, 9),
    pins=st.sets(st.integers(0, 8)),
    width=st.integers(1, 60),
    vectors=st.sampled_from([1, 2]),
    reduce_max=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_the_rules_of_the_choice(
    lengths: list[int], count: int, pins: set[int], width: int, vectors: int, reduce_max: int, seed: int
) -> None:
    """Each rule of the contract by itself, on what ONNX Runtime answers."""
    blocks = len(lengths)
    pins = {n for n in pins if n < blocks}
    inputs = make_inputs([lengths], [min(count, blocks)], [sorted(pins)], vectors=vectors, seed=seed)
    run = implementations(semantic_block_select)["onnxruntime"]
    (slot_index,) = run(*inputs, width=width, reduce_max=reduce_max)
    candidates = [n for n in range(min(count, blocks)) if lengths[n]]
    for h in range(2):
        row = slot_index[0, h].tolist()
        chosen = [s for s in row if s >= 0]
        assert row == sorted(set(chosen)) + [-1] * (width - len(chosen))
        assert len(chosen) == min(width, sum(lengths[n] for n in candidates))
        part = {n: [s for s in slots_of(inputs, 0, n) if s in chosen] for n in candidates}
        assert sum(map(len, part.values())) == len(chosen)
        cut = [n for n in candidates if 0 < len(part[n]) < lengths[n]]
        assert len(cut) <= 1 and all(part[n] == slots_of(inputs, 0, n)[: len(part[n])] for n in candidates)
        scores = published_scores(inputs, 0, h, reduce_max)
        rank = {n: (0, n > 0, -n) if n in pins else (1, -scores[n], n) for n in candidates}
        whole = [n for n in candidates if len(part[n]) == lengths[n]]
        left_out = [n for n in candidates if not part[n]]
        assert all(rank[a] < rank[b] for a in whole for b in cut + left_out)
        assert all(rank[a] < rank[b] for a in cut for b in left_out)


@pytest.mark.parametrize("kind", ALL)
def test_equal_scores_go_to_the_lowest_number(kind: str) -> None:
    inputs = make_inputs([[3] * 40], heads=(1, 1))
    inputs[0][:], inputs[1][:] = 1.0, 2.0
    inputs[1][0, 0, 30] = 3.0
    (slots,) = implementations(semantic_block_select)[kind](*inputs, width=10)
    assert slots.flatten().tolist() == [*range(7), *range(90, 93)]
    inputs[0][:], inputs[1][:] = 0.0, torch.tensor([0.0, -0.0]).repeat(20)[None, None, :, None, None]
    (slots,) = implementations(semantic_block_select)[kind](*inputs, width=10)
    assert slots.flatten().tolist() == [*range(10)]


@pytest.mark.parametrize("kind", ALL)
def test_the_first_block_that_does_not_fit_ends_the_choice(kind: str) -> None:
    """Though a shorter one behind it would fit."""
    inputs = make_inputs([[4, 5, 1]], heads=(1, 1))
    inputs[0][:] = 1.0
    inputs[1][:] = torch.tensor([3.0, 2.0, 1.0])[None, None, :, None, None]
    expected = {1: [0], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3, 4], 8: [*range(8)], 9: [*range(9)], 10: [*range(10)]}
    for width, slots in expected.items():
        assert implementations(semantic_block_select)[kind](*inputs, width=width)[0].flatten().tolist() == slots


@pytest.mark.parametrize("kind", ALL)
def test_pinned_blocks_first_and_the_latest_of_them(kind: str) -> None:
    """A pinned block beats any score, an unused or empty one adds nothing; block 0 is kept and then the latest ones."""
    inputs = make_inputs([[3, 3, 3, 0, 3, 3]], [5], [[1, 3, 4, 5]], heads=(2, 2))
    inputs[0][:] = 1.0
    inputs[1][:] = 1.0
    inputs[1][0, :, 0] = 1e30
    inputs[1][0, :, 4] = -1e30
    run = implementations(semantic_block_select)[kind]
    expected = {3: [9, 10, 11], 5: [3, 4, 9, 10, 11], 8: [0, 1, 3, 4, 5, 9, 10, 11], 12: [*range(12)]}
    for width, slots in expected.items():
        assert run(*inputs, width=width)[0].tolist() == [[slots] * 2]
    inputs[4][:] = 1
    assert run(*inputs, width=12)[0].tolist() == [[[*range(12)]] * 2]
    assert run(*inputs, width=7)[0].tolist() == [[[0, 1, 2, 6, 9, 10, 11]] * 2]
    assert run(*inputs, width=2)[0].tolist() == [[[0, 1]] * 2]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ALL)
def test_what_is_not_in_use_changes_nothing(kind: str) -> None:
    """Representatives of unused, empty and pinned blocks (NaN included), and slots of unused ones."""
    inputs = make_inputs(RAGGED, [6, 4, 8, 7], [[2], [0], [], [6]])
    poisoned = [t.clone() for t in inputs]
    for b, count in enumerate(inputs[3].tolist()):
        poisoned[1][b, :, count:] = math.nan
        poisoned[1][b, :, [n for n in range(8) if RAGGED[b][n] == 0 or inputs[4][b, n]]] = math.nan
        poisoned[2][b, count:] = 5
    run = implementations(semantic_block_select)[kind]
    for width in (7, 20):
        assert torch.equal(run(*inputs, width=width)[0], run(*poisoned, width=width)[0])


@pytest.mark.parametrize("kind", ALL)
def test_batch_rows_and_heads_are_independent(kind: str) -> None:
    inputs = make_inputs(RAGGED, [8, 6, 8, 7], [[0], [5], [], [2]], heads=(6, 3))
    run = implementations(semantic_block_select)[kind]
    (together,) = run(*inputs, width=9)
    for b in range(4):
        for h in range(3):
            one = [t[b : b + 1].contiguous() for t in inputs]
            one[0], one[1] = one[0][:, 2 * h : 2 * h + 2].contiguous(), one[1][:, h : h + 1].contiguous()
            assert torch.equal(run(*one, width=9)[0][0, 0], together[b, h])


@pytest.mark.parametrize(("vectors", "reduce_max"), [(2, 0), (2, 1), (1, 0), (1, 1)])
def test_random_scores_agree(vectors: int, reduce_max: int) -> None:
    """Floating-point scores, none closer to another than rounding errors reach."""
    done = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        inputs = make_inputs([[4] * 12, [6] * 12], heads=(6, 2), vectors=vectors, seed=seed)
        inputs[0] = torch.randn(inputs[0].shape, generator=generator)
        inputs[1] = torch.randn(inputs[1].shape, generator=generator).sort(3).values
        if margin(inputs, reduce_max) < 1e-4:
            continue
        assert_agree(semantic_block_select, inputs, 0.0, width=17, reduce_max=reduce_max)
        done += 1
    assert done > 4


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), width=st.integers(1, 40), reduce_max=st.sampled_from([0, 1]))
def test_onnxruntime_agrees_on_random_data(seed: int, width: int, reduce_max: int) -> None:
    inputs = make_inputs([[3, 6, 2, 5, 4, 6]], heads=(4, 2), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    inputs[0] = torch.randn(inputs[0].shape, generator=generator)
    inputs[1] = torch.randn(inputs[1].shape, generator=generator).sort(3).values
    assume(margin(inputs, reduce_max) > 1e-4)
    attributes: dict[str, Any] = {"width": width, "reduce_max": reduce_max}
    got = implementations(semantic_block_select)["onnxruntime"](*inputs, **attributes)
    assert torch.equal(got[0], reference(*inputs, **attributes)[0])


def test_scores_are_the_published_ones() -> None:
    for vectors in (1, 2):
        inputs = make_inputs([[4] * 6], heads=(6, 2), rows=2, vectors=vectors, seed=5)
        for reduce_max in (0, 1):
            for h in range(2):
                rows = inputs[0][0, 3 * h : 3 * h + 3].reshape(-1, 4)
                got = block_scores(rows, inputs[1][0, h], reduce_max).tolist()
                assert got == published_scores(inputs, 0, h, reduce_max)


@pytest.mark.parametrize("kind", ALL)
def test_a_width_for_everything_is_dense_attention(kind: str) -> None:
    """Map, select and attend over the chosen slots: with room for all blocks nothing is lost, and with less room the
    query's own block, which holds its key, is found."""
    generator = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(1, 2, 24, 8, generator=generator) for _ in range(2))
    lengths = torch.tensor([[5, 3, 6, 4, 6]])
    starts = lengths.cumsum(-1) - lengths
    blocks = implementations(semantic_block_map)[kind](keys, starts, lengths, max_block_length=6)
    wanted = 13  # in block 2, slots 8 to 13
    query = 3 * keys[:, :, wanted : wanted + 1].repeat_interleave(2, dim=1)
    new = [torch.randn(1, 2, 1, 8, generator=generator) for _ in range(2)]
    padded = [torch.cat([t, torch.zeros(1, 2, 4, 8)], dim=2) for t in (keys, values)]
    pinned = torch.tensor([[1, 0, 0, 0, 1]])
    count, length = torch.tensor([5]), torch.tensor([24])
    attend: Implementation = nexus_attention.reference
    state = (query, *new, *padded, torch.zeros(1, 2, 28), length)
    dense = attend(*state)[0]
    for width, exact in ((24, True), (30, True), (17, False)):
        (slots,) = implementations(semantic_block_select)[kind](query, *blocks, count, pinned, width=width)
        sparse = attend(*state, slot_index=slots)[0]
        difference = float((sparse - dense).abs().max())
        assert difference < 1e-6 if exact else 1e-5 < difference < 5e-2
        assert bool((slots == wanted).any(-1).all()) and bool((slots[..., 0] == 0).all())


def test_bfloat16_and_float64_reference() -> None:
    inputs = make_inputs(RAGGED, heads=(4, 2))
    for dtype in (torch.bfloat16, torch.float64):
        cast = [inputs[0].to(dtype), inputs[1].to(dtype), *inputs[2:]]
        assert torch.equal(reference(*cast, width=11)[0], reference(*inputs, width=11)[0])


def test_torch_operator_is_registered_correctly() -> None:
    semantic_block_select.register_torch()
    results = torch.library.opcheck(
        torch.ops.semkv.semantic_block_select.default,
        tuple(make_inputs(RAGGED)),
        {"width": 9, "reduce_max": 1},
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(results.values()) == {"SUCCESS"}
    assert isinstance(torch.ops.semkv.semantic_block_select(*make_inputs(RAGGED)), Tensor)


def test_bad_inputs_are_errors() -> None:
    inputs = make_inputs(RAGGED, heads=(5, 2))
    with pytest.raises(SemkvError, match=r"SemanticBlockSelect: query heads must be a multiple .*expected 2, got 5"):
        reference(*inputs)
    inputs = make_inputs(RAGGED, vectors=3)
    with pytest.raises(SemkvError, match=r"wrong number of vectors .*expected 1 or 2, got 3"):
        reference(*inputs)
    inputs = make_inputs(RAGGED, counts=[8, 9, 0, 8])
    with pytest.raises(SemkvError, match=r"block_count out of range .*expected 0 to 8, got \[8, 9, 0, 8\]"):
        reference(*inputs)
    inputs = make_inputs(RAGGED)
    with pytest.raises(SemkvError, match=r"width out of range .*expected 1 or more, got 0"):
        reference(*inputs, width=0)
    for slots in ([[3, 4, -1], [4, 5, -1]], [[3, 4, -1], [0, 1, -1]], [[3, -1, 4], [5, 6, 7]]):
        inputs = make_inputs([[3, 3]])
        inputs[2] = torch.tensor([slots])
        with pytest.raises(SemkvError, match=r"slots of batch row 0 do not ascend .*expected disjoint blocks"):
            reference(*inputs)
        inputs[3][:] = 0
        assert bool((reference(*inputs, width=4)[0] == -1).all())

"""SemanticBlockMap: all implementations against each other, and what its vectors and its table promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import semantic_block_map

from .conftest import Implementation, assert_agree, implementations

reference: Implementation = semantic_block_map.reference
ALL = sorted(implementations(semantic_block_map))
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def make_inputs(
    lengths: list[list[int]],
    capacity: int = 40,
    heads: int = 2,
    size: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """Blocks of these lengths, one behind the other, from slot 0 in the first row, from slot 1 in the second, ..."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor(lengths)
    start = length.cumsum(-1) - length + torch.arange(len(lengths))[:, None]
    keys = torch.randn(len(lengths), heads, capacity, size, generator=generator).to(dtype)
    return [keys, start, length]


RAGGED = [[5, 0, 7, 1, 0], [1, 1, 2, 3, 7], [0, 0, 0, 0, 0], [7, 7, 7, 7, 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("heads", [1, 3])
def test_implementations_agree(heads: int, vectors: int, dtype: torch.dtype) -> None:
    """Ragged rows, rows without any block, and full ones; smallest and largest values to the bit."""
    inputs = make_inputs(RAGGED, heads=heads, dtype=dtype)
    tolerance = TOLERANCE[dtype] if vectors == 1 else 0.0
    representatives, slots = assert_agree(semantic_block_map, inputs, tolerance, vectors=vectors, max_block_length=7)
    assert representatives.shape == (4, heads, 5, vectors, 4) and representatives.dtype == dtype
    assert slots.shape == (4, 5, 7) and (slots >= 0).sum(-1).tolist() == RAGGED
    assert not representatives[2].any() and not representatives[0, :, 1].any()


def test_defaults_and_a_longer_cache() -> None:
    inputs = make_inputs([[40, 24, 32, 40, 31, 33]], capacity=256, size=16)
    representatives, slots = assert_agree(semantic_block_map, inputs, 0.0)
    assert representatives.shape[3] == 2 and slots.shape == (1, 6, 40)
    assert slots[slots >= 0].tolist() == list(range(200))


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 6)), min_size=1, max_size=6),
    vectors=st.sampled_from([1, 2]),
    longer=st.integers(0, 5),
)
def test_any_blocks(blocks: list[tuple[int, int]], vectors: int, longer: int) -> None:
    """Against a plain statement with Python slices; in any order, overlapping, and an empty one starting anywhere."""
    blocks = [(start if length == 0 else min(start, 20 - length), length) for start, length in blocks]
    start, length = (torch.tensor([[block[i] for block in blocks]]) for i in (0, 1))
    start[length == 0] = torch.randint(-99, 99, start.shape, generator=torch.Generator().manual_seed(1))[length == 0]
    keys = make_inputs([[1]], capacity=20)[0]
    run = implementations(semantic_block_map)["onnxruntime"]
    representatives, slots = run(keys, start, length, vectors=vectors, max_block_length=6 + longer)
    for n, (first, count) in enumerate(blocks):
        assert slots[0, n].tolist() == [*range(first, first + count), *[-1] * (6 + longer - count)]
        rows = keys[0, :, first : first + count]
        if count == 0:
            assert not representatives[0, :, n].any()
        elif vectors == 1:
            torch.testing.assert_close(representatives[0, :, n, 0], rows.sum(1) / count, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(representatives[0, :, n], torch.stack([rows.amin(1), rows.amax(1)], 1))


@pytest.mark.parametrize("kind", ALL)
def test_no_slot_product_exceeds_the_bound(kind: str) -> None:
    """What smallest and largest values are for (Quest): sum_d max(q_d s_d, q_d l_d) >= q . k for every key k."""
    keys, start, length = make_inputs(RAGGED, size=8, seed=3)
    representatives, slots = implementations(semantic_block_map)[kind](keys, start, length, max_block_length=7)
    query = torch.randn(8, generator=torch.Generator().manual_seed(1)).double()
    bound = (query * representatives.double()).amax(3).sum(-1)
    for b, n in (length > 0).nonzero().tolist():
        inside = keys[b, :, slots[b, n][slots[b, n] >= 0]].double() @ query
        assert bool((inside.amax(-1) <= bound[b, :, n] + 1e-9).all())


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("kind", ALL)
def test_slots_outside_blocks_change_nothing(kind: str, vectors: int) -> None:
    inputs = make_inputs(RAGGED)
    poisoned = [t.clone() for t in inputs]
    for b, lengths in enumerate(RAGGED):
        outside = [slot for slot in range(40) if not b <= slot < b + sum(lengths)]
        poisoned[0][b, :, outside] = 3e38
    run = implementations(semantic_block_map)[kind]
    attributes: dict[str, Any] = {"vectors": vectors, "max_block_length": 9}
    for clean, dirty in zip(run(*inputs, **attributes), run(*poisoned, **attributes), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("kind", ALL)
def test_a_block_mapped_alone_is_the_same(kind: str) -> None:
    """So a method maps the block that closes and nothing else; and batch rows are independent."""
    keys, start, length = make_inputs(RAGGED)
    run = implementations(semantic_block_map)[kind]
    together = run(keys, start, length, vectors=1, max_block_length=7)
    for b in range(2):
        for n in range(5):
            one = [t[b : b + 1, n : n + 1].contiguous() for t in (start, length)]
            alone = run(keys[b : b + 1].contiguous(), *one, vectors=1, max_block_length=7)
            torch.testing.assert_close(alone[0][0, :, 0], together[0][b, :, n], atol=1e-6, rtol=1e-6)
            assert torch.equal(alone[1][0, 0], together[1][b, n])


def test_bfloat16_and_float64_reference() -> None:
    keys, start, length = make_inputs(RAGGED)
    double = reference(keys.double(), start, length, 1, 7)[0]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), reference(keys, start, length, 1, 7)[0], atol=1e-6, rtol=1e-6)
    low = keys.bfloat16()
    exact, rounded = (reference(k, start, length, 1, 7)[0] for k in (low.float(), low))
    assert torch.equal(rounded, exact.bfloat16())


def test_torch_operator_is_registered_correctly() -> None:
    semantic_block_map.register_torch()
    for vectors in (1, 2):
        results = torch.library.opcheck(
            torch.ops.semkv.semantic_block_map.default,
            tuple(make_inputs(RAGGED)),
            {"vectors": vectors, "max_block_length": 8},
            test_utils=("test_schema", "test_faketensor"),
        )
        assert set(results.values()) == {"SUCCESS"}


def test_bad_inputs_are_errors() -> None:
    keys, start, length = make_inputs(RAGGED)
    with pytest.raises(SemkvError, match=r"SemanticBlockMap: wrong number of vectors .*expected 1 or 2, got 3"):
        reference(keys, start, length, vectors=3)
    with pytest.raises(SemkvError, match=r"block length out of range .*expected 0 to 6"):
        reference(keys, start, length, max_block_length=6)
    with pytest.raises(SemkvError, match=r"block length out of range .*got \[\[-1\]\]"):
        reference(keys[:1], torch.tensor([[0]]), torch.tensor([[-1]]))
    for first, last in ((-1, 3), (36, 40)):
        with pytest.raises(SemkvError, match=rf"block 0 reaches outside .*slots 0 to 39, got {first} to {last}"):
            reference(keys[:1], torch.tensor([[first]]), torch.tensor([[5]]))
    with pytest.raises(SemkvError, match="dimension N differs"):
        reference(keys, start, length[:, :3])
    assert math.isfinite(float(reference(keys, start, length)[0].sum()))

"""CompactCache: all implementations against each other, and what it means for attention."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import compact_cache, nexus_attention

from .conftest import Implementation, assert_agree, implementations

reference: Implementation = compact_cache.reference
ALL = sorted(implementations(compact_cache))


def make_inputs(keep: Tensor, heads: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, _, capacity = keep.shape
    keys, values = (torch.randn(batch, heads, capacity, 4, generator=generator).to(dtype) for _ in range(2))
    return [keys, values, torch.randn(batch, heads, capacity, generator=generator), keep]


def random_keep(batch: int, groups: int, capacity: int, kept: float, seed: int = 0) -> Tensor:
    """A shuffled choice of slots with holes in it; negatives of several values."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, groups, capacity, generator=generator).argsort(-1)
    hole = torch.rand(batch, groups, capacity, generator=generator) > kept
    return torch.where(hole, -torch.randint(1, 9, order.shape, generator=generator), order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_implementations_agree(groups: int, kept: float, dtype: torch.dtype) -> None:
    """To the bit: nothing is computed."""
    inputs = make_inputs(random_keep(2, groups, 12, kept), dtype=dtype)
    out = assert_agree(compact_cache, inputs, 0.0)
    assert out[3].tolist() == (inputs[3] >= 0).sum(-1).amax(-1).tolist()


@settings(max_examples=40, deadline=None)
@given(
    keep=st.lists(st.lists(st.integers(-3, 7), min_size=8, max_size=8), min_size=1, max_size=3),
    per_head=st.booleans(),
)
def test_any_list_of_slots(keep: list[list[int]], per_head: bool) -> None:
    """Against a plain statement with Python lists; one slot may be named twice."""
    index = torch.tensor(keep)[None] if per_head else torch.tensor(keep)[:, None]
    heads = len(keep) if per_head else 2
    inputs = make_inputs(index, heads=heads)
    keys, values, bias, length = implementations(compact_cache)["onnxruntime"](*inputs)
    for b in range(index.shape[0]):
        lists = [[j for j in index[b, h if per_head else 0].tolist() if j >= 0] for h in range(heads)]
        assert int(length[b]) == max(map(len, lists))
        for h, slots in enumerate(lists):
            for got, old in ((keys, inputs[0]), (values, inputs[1]), (bias, inputs[2])):
                assert torch.equal(got[b, h, : len(slots)], old[b, h, slots])
            assert not keys[b, h, len(slots) :].any() and not values[b, h, len(slots) :].any()
            tail = [-math.inf] * (int(length[b]) - len(slots)) + [0.0] * (8 - int(length[b]))
            assert bias[b, h, len(slots) :].tolist() == tail


@pytest.mark.parametrize("kind", ALL)
def test_keeping_everything_changes_no_bit(kind: str) -> None:
    inputs = make_inputs(torch.arange(12).expand(2, 1, 12).contiguous())
    inputs[0][0, 0, 3, 1] = -0.0
    out = implementations(compact_cache)[kind](*inputs)
    for got, old in zip(out[:3], inputs[:3], strict=True):
        assert torch.equal(got.view(torch.int32), old.view(torch.int32))
    assert out[3].tolist() == [12, 12]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ALL)
def test_attention_after_compaction_is_masked_attention(kind: str, groups: int) -> None:
    """Deleting slots and masking them give the same output, also when heads keep different numbers of slots."""
    keep = random_keep(2, groups, 12, 0.5, seed=4)
    keep = torch.where(keep < 10, keep, -1)
    keys, values, bias, _ = make_inputs(keep, heads=2)
    kept = torch.zeros(2, 2, 13, dtype=torch.bool).scatter(2, keep.where(keep >= 0, 12).expand(2, 2, 12), True)[
        ..., :12
    ]
    masked = torch.where(kept, bias, -math.inf)
    new = [torch.randn(2, h, 1, 4, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2)]
    attend = implementations(nexus_attention)[kind]
    before = attend(*new, keys, values, masked, torch.tensor([10, 10]))
    after = attend(*new, *implementations(compact_cache)[kind](keys, values, bias, keep))
    torch.testing.assert_close(after[0], before[0], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", ALL)
def test_slots_left_behind_change_nothing(kind: str) -> None:
    inputs = make_inputs(random_keep(2, 1, 12, 0.5))
    poisoned = [t.clone() for t in inputs]
    for b in range(2):
        left = [j for j in range(12) if j not in inputs[3][b].flatten().tolist()]
        poisoned[0][b, :, left], poisoned[1][b, :, left], poisoned[2][b, :, left] = 3e38, -3e38, math.nan
    run = implementations(compact_cache)[kind]
    assert all(torch.equal(a, b) for a, b in zip(run(*inputs), run(*poisoned), strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_batch_rows_are_independent(kind: str) -> None:
    inputs = make_inputs(random_keep(3, 3, 12, 0.5))
    run = implementations(compact_cache)[kind]
    together = run(*inputs)
    for b in range(3):
        alone = run(*(t[b : b + 1].contiguous() for t in inputs))
        assert all(torch.equal(row[0], whole[b]) for row, whole in zip(alone, together, strict=True))


def test_torch_operator_is_registered_correctly() -> None:
    compact_cache.register_torch()
    results = torch.library.opcheck(
        torch.ops.semkv.compact_cache.default,
        tuple(make_inputs(random_keep(2, 1, 12, 0.5))),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(results.values()) == {"SUCCESS"}


def test_bad_inputs_are_errors() -> None:
    inputs = make_inputs(torch.full((1, 1, 12), 12))
    with pytest.raises(SemkvError, match=r"CompactCache: keep_index names a slot outside .*expected below 12, got 12"):
        reference(*inputs)
    with pytest.raises(SemkvError, match=r"wrong number of groups .*expected 1 or 3, got 2"):
        reference(*inputs[:3], torch.zeros(1, 2, 12, dtype=torch.int64))

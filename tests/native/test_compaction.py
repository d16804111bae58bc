"""CompactCache and SemanticCluster of libsemkv_onnxruntime.so against the operators' references, in ONNX Runtime."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semkv_deploy.ops import compact_cache, semantic_cluster

from .runner import run_node

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def caches(batch: int, heads: int, capacity: int, size: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Keys in families of alike ones, values, biases."""
    generator = torch.Generator().manual_seed(seed)
    families = torch.randn(batch, heads, 1 + capacity // 8, size, generator=generator)
    family = torch.randint(0, families.shape[2], (capacity,), generator=generator)
    keys = families[:, :, family] + 0.3 * torch.randn(batch, heads, capacity, size, generator=generator)
    values = torch.randn(batch, heads, capacity, size, generator=generator)
    bias = torch.log(torch.randint(1, 4, (batch, 1, capacity), generator=generator).float())
    return [keys.to(dtype), values.to(dtype), bias.expand(batch, heads, capacity).contiguous()]


def fresh(*tensors: tuple[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 77) for name, tensor in tensors}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_kept_slots_come_out_bit_for_bit(
    native_library: Path, dtype: torch.dtype, by_head: bool, in_place: bool
) -> None:
    """In any order, named twice, with holes, none and all of them."""
    batch, heads, capacity = 3, 2, 40
    inputs = caches(batch, heads, capacity, 12, dtype, 0)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(-capacity, capacity, (batch, heads if by_head else 1, capacity), generator=generator)
    index = index.clamp(min=-1)
    index[1] = -1
    index[2] = torch.arange(capacity - 1, -1, -1)
    inputs.append(index)
    want = compact_cache.reference(*inputs)
    outputs = fresh(("length_out", want[3]))
    got = run_node(native_library, "CompactCache", (), inputs, outputs, in_place=in_place)
    for found, wanted in zip(got, want, strict=True):
        assert torch.equal(found, wanted)


def test_slots_outside_the_cache_are_refused(native_library: Path) -> None:
    inputs = [*caches(1, 2, 8, 4, torch.float32, 0), torch.full((1, 1, 8), 8)]
    with pytest.raises(Exception, match="keep_index names a slot outside the cache: expected below 8, got 8"):
        run_node(native_library, "CompactCache", (), inputs, fresh(("length_out", torch.zeros(1, dtype=torch.int64))))


def cluster_inputs(dtype: torch.dtype, by_head: bool, seed: int, span: int = 16) -> list[Tensor]:
    """Four rows: one that fits, one that a level suits, one that no level suits, one that is empty."""
    batch, heads, capacity, levels = 4, 2, 3 * span, 3
    keys, values, bias = caches(batch, heads, capacity, 20, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    if by_head:
        bias = torch.log(torch.randint(1, 4, bias.shape, generator=generator).float())
    bias[1, :, 3] = -math.inf
    groups = heads if by_head else 1
    lengths = torch.tensor([20, capacity, capacity - 5, 0])
    chunk = torch.arange(capacity).expand(batch, groups, levels, capacity) // 11
    chunk = torch.where(torch.rand(chunk.shape, generator=generator) < 0.2, -1, chunk)
    thresholds = torch.tensor([0.95, 0.8, 0.3])
    return [
        keys,
        values,
        bias,
        lengths,
        chunk.contiguous(),
        thresholds,
        torch.tensor([20, capacity - 5 - 6 * seed, 4, 0]),
    ]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_clusters_are_the_reference(native_library: Path, dtype: torch.dtype, by_head: bool, in_place: bool) -> None:
    """The same slots, levels and lengths; means within the type's rounding."""
    levels = set()
    for seed in range(3):
        inputs = cluster_inputs(dtype, by_head, seed)
        want = semantic_cluster.reference(*inputs, span=16)
        outputs = fresh(("length_out", want[3]), ("source_slot", want[4]), ("level", want[5]))
        got = run_node(native_library, "SemanticCluster", (), inputs, outputs, in_place=in_place, span=16)
        for found, wanted in zip(got[3:], want[3:], strict=True):
            assert torch.equal(found, wanted)
        for found, wanted in zip(got[:3], want[:3], strict=True):
            allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[found.dtype]
            torch.testing.assert_close(found, wanted, atol=allowed, rtol=allowed)
        alone = want[4] >= 0
        assert alone.any()
        levels |= set(want[5].tolist())
    assert levels >= {-1, 2} and len(levels) > 2


def test_threads_and_batches_change_nothing(native_library: Path) -> None:
    inputs = cluster_inputs(torch.float32, True, 0)
    want = semantic_cluster.reference(*inputs, span=16)
    shapes = (("length_out", want[3]), ("source_slot", want[4]), ("level", want[5]))
    one, three = (
        run_node(native_library, "SemanticCluster", (), inputs, fresh(*shapes), threads=n, span=16) for n in (1, 3)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_a_capacity_that_span_does_not_divide_is_refused(native_library: Path) -> None:
    inputs = cluster_inputs(torch.float32, False, 0)
    want = semantic_cluster.reference(*inputs, span=16)
    outputs = fresh(("length_out", want[3]), ("source_slot", want[4]), ("level", want[5]))
    with pytest.raises(Exception, match="the capacity: expected a multiple of span 64, got 48"):
        run_node(native_library, "SemanticCluster", (), inputs, outputs, span=64)

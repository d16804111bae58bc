"""CompactCache and SemanticCluster of libsemkv_onnxruntime.so against the operators' references, in ONNX Runtime."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semkv_deploy.ops import compact_cache, native, semantic_cluster
from semkv_deploy.ops.native import narrowed, rotated, widened

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


@pytest.mark.parametrize("in_place", [True, False])
def test_kept_codes_come_out_with_their_scales(native_library: Path, in_place: bool) -> None:
    batch, heads, capacity = 2, 2, 24
    keys, values, bias = caches(batch, heads, capacity, 12, torch.float32, 2)
    index = torch.tensor([[[3, 4, 5, -1, 20, 19] + 18 * [-1]], [list(range(capacity))]])
    (key, key_scale), (value, value_scale) = narrowed(keys, torch.int8), narrowed(values, torch.int8)
    inputs = [key, value, bias, index, key_scale, value_scale]
    want = native.compact_reference(*inputs)
    outputs = fresh(("length_out", want[3]))
    got = run_node(native_library, "CompactCache", ("int8",), inputs, outputs, in_place=in_place)
    for found, wanted in zip(got, want, strict=True):
        assert torch.equal(found, wanted)
    assert want[4][0, 0, 4] == key_scale[0, 0, 19] and want[4][0, 0, 5:].abs().sum() == 0


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


@pytest.mark.parametrize("seed_keys", [0, 1])
@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("dtype", [*TYPES, torch.int8], ids=str)
def test_caches_as_they_lie(native_library: Path, dtype: torch.dtype, by_head: bool, seed_keys: int) -> None:
    """Rotated by positions, and codes: the same slots and levels, seeds and slots alone bit for bit, means rounded."""
    for seed in range(2):
        inputs = cluster_inputs(torch.float32, by_head, seed)
        frequency = 10_000.0 ** -(torch.arange(0, 14, 2) / 14)
        position = torch.arange(inputs[0].shape[2]) * 37 + 9000
        position = position.expand(4, inputs[4].shape[1], -1).contiguous()
        inputs[0] = rotated(inputs[0], position, frequency)
        (inputs[0], key_scale), (inputs[1], value_scale) = (narrowed(rows, dtype) for rows in inputs[:2])
        more = {"slot_position": position, "frequency": frequency}
        scales = {"key_scale": key_scale, "value_scale": value_scale} if dtype == torch.int8 else {}
        want = native.cluster_reference(*inputs, **more, **scales, span=16, seed_keys=seed_keys)
        outputs = fresh(("length_out", want[3]), ("source_slot", want[4]), ("level", want[5]))
        options = ("unrotated", "int8") if scales else ("unrotated",)
        given = [*inputs, *more.values(), *scales.values()]
        got = run_node(native_library, "SemanticCluster", options, given, outputs, span=16, seed_keys=seed_keys)
        for found, wanted in zip(got[3:6], want[3:6], strict=True):
            assert torch.equal(found, wanted)
        torch.testing.assert_close(got[2], want[2])
        allowed = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.int8: 5e-2}[dtype]
        for part in range(2):
            found, wanted = (widened(each[part], each[6 + part] if scales else None) for each in (got, want))
            torch.testing.assert_close(found, wanted, atol=allowed, rtol=allowed)
            alone = (want[2] == inputs[2].gather(2, want[4].clamp_min(0).expand_as(want[2]))) & (want[4] >= 0)
            same = alone if part or not seed_keys else (want[4] >= 0).expand_as(alone)
            assert alone.any() and torch.equal(got[part][same], want[part][same])


def test_more_frequencies_than_a_head_has_are_refused(native_library: Path) -> None:
    inputs = cluster_inputs(torch.float32, False, 0)
    want = semantic_cluster.reference(*inputs, span=16)
    outputs = fresh(("length_out", want[3]), ("source_slot", want[4]), ("level", want[5]))
    inputs += [torch.zeros(want[4].shape, dtype=torch.int64), torch.ones(11)]
    with pytest.raises(Exception, match="frequencies: expected at most 10, half the head size, got 11"):
        run_node(native_library, "SemanticCluster", ("unrotated",), inputs, outputs, span=16)


@pytest.mark.parametrize("span", [32, 64])
def test_a_long_cache_of_many_chunks(native_library: Path, span: int) -> None:
    """Tiles and their neighbours: sinks and a window that stay, chunks shorter and longer than the span, dead slots."""
    heads, capacity = 3, 6 * 64
    keys, values, bias = caches(1, heads, capacity, 64, torch.float32, 5)
    bias[:, :, 100:103] = -math.inf
    chunk = torch.cat([torch.arange(60) // 7, 100 + torch.arange(324) // 90])
    chunk[:5] = chunk[300:] = -1
    chunk[50:290:17] = -1
    chunks = torch.stack([chunk, torch.where(chunk >= 0, chunk // 2, -1)]).expand(1, 1, 2, capacity).contiguous()
    lengths, thresholds, target = torch.tensor([capacity - 3]), torch.tensor([0.9, 0.6]), torch.tensor([250])
    inputs = [keys, values, bias, lengths, chunks, thresholds, target]
    want = semantic_cluster.reference(*inputs, span=span)
    outputs = fresh(("length_out", want[3]), ("source_slot", want[4]), ("level", want[5]))
    got = run_node(native_library, "SemanticCluster", (), inputs, outputs, span=span)
    assert want[5] == 1 and want[3] < capacity - 60
    for found, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)

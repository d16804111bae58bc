"""CompactCache and SemanticCluster of libsemkv_onnxruntime_cuda.so: the references' caches, slots and levels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from semkv_deploy.ops import compact_cache, native, semantic_cluster
from semkv_deploy.ops.native import narrowed
from tests.native.runner import run_node
from tests.native.test_compaction import TYPES, caches, cluster_inputs, fresh

LONG = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_kept_slots_come_out_bit_for_bit(
    cuda_library: Path, native_library: Path, dtype: torch.dtype, by_head: bool
) -> None:
    """In any order, named twice, with holes, none and all of them; the CPU library's bits too."""
    batch, heads, capacity = 3, 2, 40
    inputs = caches(batch, heads, capacity, 16, dtype, 0)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(-capacity, capacity, (batch, heads if by_head else 1, capacity), generator=generator)
    index = index.clamp(min=-1)
    index[1] = -1
    index[2] = torch.arange(capacity - 1, -1, -1)
    inputs.append(index)
    want = compact_cache.reference(*inputs)
    for library in (cuda_library, native_library):
        for in_place in (True, False):
            outputs = fresh(("length_out", want[3]))
            got = run_node(library, "CompactCache", (), inputs, outputs, in_place=in_place)
            assert all(torch.equal(found, wanted) for found, wanted in zip(got, want, strict=True))


def test_a_slot_outside_the_cache_shows_in_the_length(cuda_library: Path) -> None:
    """The CPU library refuses it; here the row stays as it is, with a length that attention answers with NaN."""
    inputs = [*caches(2, 2, 8, 16, torch.float32, 0), torch.full((2, 1, 8), 8)]
    inputs[3][1] = torch.arange(8)
    got = run_node(cuda_library, "CompactCache", (), inputs, fresh(("length_out", torch.zeros(2, dtype=torch.int64))))
    assert got[3].tolist() == [-1, 8]
    assert torch.equal(got[0], inputs[0]) and torch.equal(got[2], inputs[2])


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_clusters_are_the_reference(
    cuda_library: Path, native_library: Path, dtype: torch.dtype, by_head: bool
) -> None:
    """The same slots, levels and lengths as the reference and the CPU library; means within the type's rounding."""
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for seed in range(3):
        # Kernels read rows of 16 bytes: of the 20 channels that these have, 16.
        keys, values, *others = cluster_inputs(dtype, by_head, seed)
        inputs = [keys[..., :16].contiguous(), values[..., :16].contiguous(), *others]
        want = semantic_cluster.reference(*inputs, span=16)
        assert bool((want[4] >= 0).any())
        for library in (cuda_library, native_library):
            outputs = fresh(("length_out", want[3]), ("source_slot", want[4]), ("level", want[5]))
            got = run_node(library, "SemanticCluster", (), inputs, outputs, in_place=seed % 2 == 0, span=16)
            assert all(torch.equal(found, wanted) for found, wanted in zip(got[3:], want[3:], strict=True))
            for number, (found, wanted) in enumerate(zip(got[:3], want[:3], strict=True)):
                close = allowed if number < 2 else 1e-5
                torch.testing.assert_close(found, wanted, atol=close, rtol=close)


def refused(library: Path, operator: str, options: tuple[str, ...], inputs: list[Tensor], **attributes: float) -> str:
    outputs = {"length_out": LONG, "source_slot": LONG[:, None, None], "level": LONG}
    if operator == "CompactCache":
        outputs = {"length_out": LONG}
    with pytest.raises(Exception) as caught:
        run_node(library, operator, options, inputs, outputs, **attributes)
    return str(caught.value)


def test_shapes_are_refused(cuda_library: Path) -> None:
    inputs = cluster_inputs(torch.float32, False, 0)
    message = refused(cuda_library, "SemanticCluster", (), inputs)
    assert "the capacity: expected a multiple of span 64, got 48" in message
    message = refused(cuda_library, "SemanticCluster", (), inputs, span=65)
    assert "attribute span: expected 1 to 64, got 65" in message
    kept = [*caches(1, 3, 8, 16, torch.float32, 0), torch.zeros(1, 2, 8, dtype=torch.int64)]
    assert "groups of keep_index: expected 1 or 3, got 2" in refused(cuda_library, "CompactCache", (), kept)
    odd = [*caches(1, 3, 8, 12, torch.float16, 0), torch.zeros(1, 1, 8, dtype=torch.int64)]
    assert "head size: expected a multiple of 8, got 12" in refused(cuda_library, "CompactCache", (), odd)


def test_forms_without_kernels_are_refused_when_the_session_is_made(cuda_library: Path) -> None:
    keys, values, bias = caches(1, 2, 16, 16, torch.float32, 0)
    index, lengths = torch.full((1, 1, 16), -1), torch.tensor([16])
    queries = torch.zeros(1, 2, 4, 16)
    fitted = [keys, values, bias, index, lengths, lengths, torch.tensor(1.0), queries]
    message = refused(cuda_library, "CompactCache", ("fitted",), fitted)
    assert "semkv CompactCache_fitted: a form for the CUDA kernels: expected CompactCache, got" in message
    cluster = cluster_inputs(torch.float32, False, 0)
    unrotated = [*cluster, torch.zeros(4, 1, 48, dtype=torch.int64), torch.ones(4)]
    message = refused(cuda_library, "SemanticCluster", ("unrotated",), unrotated, span=16)
    assert "semkv SemanticCluster_unrotated: a form for the CUDA kernels" in message
    (key, key_scale), (value, value_scale) = narrowed(keys, torch.int8), narrowed(values, torch.int8)
    codes = [key, value, bias, index, key_scale, value_scale]
    assert native.compact_reference(*codes)[3].tolist() == [0]
    message = refused(cuda_library, "CompactCache", ("int8",), codes)
    assert "caches for the CUDA kernels: expected float32, float16 or bfloat16, got int8" in message

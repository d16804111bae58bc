"""SemanticBlockMap and SemanticBlockSelect of libsemkv_onnxruntime_cuda.so: the references' blocks and chosen slots."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semkv_deploy.ops import semantic_block_map, semantic_block_select
from tests.native.runner import run_node

sys.path.append(str(Path(__file__).resolve().parents[3] / "plugins" / "gpu_check"))

from block_cases import map_case, select_case


def run_map(library: Path, inputs: tuple[Tensor, ...], *, vectors: int, max_block_length: int) -> list[Tensor]:
    (batch, heads, _, size), blocks = inputs[0].shape, inputs[1].shape[1]
    fresh = {
        "representatives": torch.full((batch, heads, blocks, vectors, size), 7, dtype=inputs[0].dtype),
        "block_slots": torch.full((batch, blocks, max_block_length), 7),
    }
    attributes = {"vectors": vectors, "max_block_length": max_block_length}
    return run_node(library, "SemanticBlockMap", (), inputs, fresh, **attributes)


def run_select(library: Path, inputs: tuple[Tensor, ...], width: int, reduce_max: int) -> Tensor:
    fresh = {"slot_index": torch.full((inputs[0].shape[0], inputs[1].shape[1], width), 7)}
    attributes = {"width": width, "reduce_max": reduce_max}
    return run_node(library, "SemanticBlockSelect", (), inputs, fresh, **attributes)[0]


@pytest.mark.parametrize("seed", range(1, 24))
def test_blocks_are_the_reference(cuda_library: Path, native_library: Path, seed: int) -> None:
    inputs, attributes = map_case(seed)
    want = semantic_block_map.reference(*inputs, **attributes)
    got = run_map(cuda_library, inputs, **attributes)
    allowed = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[inputs[0].dtype]
    torch.testing.assert_close(got[0], want[0], rtol=allowed, atol=allowed)
    assert torch.equal(got[1], want[1])
    if inputs[0].dtype == torch.float32:
        theirs = run_map(native_library, inputs, **attributes)
        torch.testing.assert_close(got[0], theirs[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(got[1], theirs[1])


@pytest.mark.parametrize("seed", range(1, 24))
def test_chosen_slots_are_the_reference(cuda_library: Path, native_library: Path, seed: int) -> None:
    inputs, attributes = select_case(seed)
    width, largest = attributes["width"], attributes["reduce_max"]
    (want,) = semantic_block_select.reference(*inputs, width, largest)
    assert torch.equal(run_select(cuda_library, inputs, width, largest), want)
    if inputs[0].dtype == torch.float32:
        assert torch.equal(run_select(native_library, inputs, width, largest), want)


def test_what_cannot_be_is_seen_in_what_comes_out(cuda_library: Path) -> None:
    """Blocks and counts lie on the device: what the CPU library refuses becomes NaN, and slots that no cache has."""
    keys = torch.randn(1, 2, 64, 64)
    inputs = (keys, torch.tensor([[60, 3]]), torch.tensor([[5, 4]]))
    vectors, slots = run_map(cuda_library, inputs, vectors=2, max_block_length=8)
    assert bool(vectors[:, :, 0].isnan().all()) and bool(vectors[:, :, 1].isfinite().all())
    assert slots[0].tolist() == [[64] * 8, [3, 4, 5, 6, -1, -1, -1, -1]]
    chosen = run_select(cuda_library, (torch.ones(1, 2, 1, 64), vectors, slots, torch.tensor([3]), slots[..., 0]), 9, 0)
    assert bool((chosen == 2**31 - 1).all())


def test_shapes_and_attributes_are_refused(cuda_library: Path) -> None:
    inputs, attributes = map_case(3)
    with pytest.raises(Exception, match="semkv SemanticBlockMap: vectors: expected 1 or 2, got 3"):
        run_map(cuda_library, inputs, **{**attributes, "vectors": 3})
    with pytest.raises(Exception, match=r"semkv SemanticBlockMap: size N of block_length"):
        run_map(cuda_library, (*inputs[:2], inputs[2][:, :-1].contiguous()), **attributes)
    chosen, options = select_case(1)
    with pytest.raises(Exception, match="semkv SemanticBlockSelect: width: expected 1 to 2147483647, got 0"):
        run_select(cuda_library, chosen, 0, options["reduce_max"])
    many = (torch.cat([chosen[0][:, :1]] * (chosen[1].shape[1] + 1), 1).contiguous(), *chosen[1:])
    if chosen[1].shape[1] > 1:
        with pytest.raises(Exception, match="query heads: expected a multiple of"):
            run_select(cuda_library, many, 9, 0)

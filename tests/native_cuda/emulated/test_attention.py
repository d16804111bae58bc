"""NexusAttention of libsemkv_onnxruntime_cuda.so in ONNX Runtime: the reference's outputs, and the CPU library's."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.native.attention_cases import Case, expected, inputs_of
from tests.native.runner import native_attention
from tests.native.test_nexus_attention import ATTRIBUTES, TOLERANCE

F32, F16, BF16, I8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
TYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F32, I8), (F16, I8), (BF16, I8)]
SIZES = [64, 80, 96, 128, 256]
HEADS = [(3, 1), (4, 4), (6, 2), (8, 1)]
ROWS = [1, 2, 13]


def compare(got: list[Tensor], want: list[Tensor], case: Case) -> None:
    """Caches and scales bit for bit, outputs and mass within the type's rounding."""
    kept = 4 if case.cache == I8 else 2
    for number, (found, wanted) in enumerate(zip(got, want, strict=True)):
        if 0 < number <= kept:
            assert torch.equal(found, wanted), f"cache or scale {number} differs"
        else:
            allowed = TOLERANCE[case.dtype] if number == 0 else 2e-4
            torch.testing.assert_close(found.float(), wanted.float(), atol=allowed, rtol=allowed)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_it_is_the_reference_and_the_cpu_library(
    cuda_library: Path, native_library: Path, types: tuple[torch.dtype, torch.dtype]
) -> None:
    """All forms: named slots or all, with attention mass or without, in place and copied; none, few and all live."""
    for number, (size, heads, rows) in enumerate(itertools.product(SIZES, HEADS, ROWS)):
        if number % 5:
            continue
        case = Case(
            (0, 5, 40 - rows),
            rows,
            *heads,
            size=size,
            capacity=40,
            dtype=types[0],
            cache=types[1],
            width=12 if number % 2 else 0,
        )
        attributes = ATTRIBUTES[number // 5 % len(ATTRIBUTES)]
        inputs = inputs_of(case, number)
        options = (*case.options, "mass") if number % 4 < 2 else case.options
        want = expected(case, inputs, **attributes)
        outputs = {"in_place": number % 3 > 0, **attributes}
        got = native_attention(cuda_library, inputs, *options, **outputs)
        compare(got, want if "mass" in options else want[:-1], case)
        compare(got, native_attention(native_library, inputs, *options, **outputs), case)


def test_dead_slots_change_nothing(cuda_library: Path) -> None:
    inputs = inputs_of(Case((20, 7), 2))
    first = native_attention(cuda_library, inputs)[0]
    for b, used in enumerate((20, 7)):
        for tensor in inputs[3:6]:
            tensor[b, :, used:] = 3
        for tensor in inputs[3:5]:
            tensor[b, :, 1] = 0
    assert torch.equal(native_attention(cuda_library, inputs)[0], first)


def test_a_length_that_cannot_be_is_nan_in_its_row_alone(cuda_library: Path) -> None:
    """Lengths lie on the device, where no host looks at them: what the CPU library refuses shows as NaN."""
    inputs = inputs_of(Case((9, 9, 9), 2, capacity=24))
    good = native_attention(cuda_library, inputs)
    inputs[6] = torch.tensor([9, 23, -1])
    output, keys, values = native_attention(cuda_library, inputs)
    assert bool(output[1:].isnan().all()) and torch.equal(output[0], good[0][0])
    assert torch.equal(keys[1:], inputs[3][1:]) and torch.equal(values[1:], inputs[4][1:])


def refused(library: Path, change: dict[int, Tensor], case: Case) -> str:
    inputs = inputs_of(case)
    for number, tensor in change.items():
        inputs[number] = tensor
    with pytest.raises(Exception) as caught:
        native_attention(library, inputs, *case.options)
    return str(caught.value)


def test_shapes_are_refused_as_by_the_cpu_library(cuda_library: Path, native_library: Path) -> None:
    for change, case in (
        ({5: torch.zeros(1, 2, 95)}, Case((4,))),
        ({}, Case((4,), heads=5, kv_heads=2)),
        ({6: torch.tensor([4, 4])}, Case((4,))),
        ({1: torch.zeros(1, 2, 2, 64)}, Case((4,))),
    ):
        ours, theirs = (refused(library, change, case) for library in (cuda_library, native_library))
        assert "semkv NexusAttention: " in ours
        assert ours.split("semkv NexusAttention: ")[1] == theirs.split("semkv NexusAttention: ")[1]


def test_sizes_without_a_kernel_are_refused(cuda_library: Path) -> None:
    message = refused(cuda_library, {}, Case((4,), size=72))
    assert "semkv NexusAttention: head size: expected 64, 80, 96, 128 or 256, got 72" in message
    message = refused(cuda_library, {}, Case((0,), 5, capacity=4))
    assert "the new rows do not fit the cache: expected at most 4, got 5" in message


@pytest.mark.parametrize("cache", [F16, BF16], ids=str)
def test_caches_narrower_than_rows_are_refused_when_the_session_is_made(cuda_library: Path, cache: torch.dtype) -> None:
    message = refused(cuda_library, {}, Case((4,), cache=cache, width=5))
    assert "caches for the CUDA kernels: expected the type of the query, or int8, got a narrower type" in message

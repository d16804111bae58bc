"""NexusAttention of libsemkv_onnxruntime.so against the operator's reference, in ONNX Runtime."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .attention_cases import Case, expected, inputs_of
from .runner import native_attention

F32, F16, BF16, I8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
TYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16), (F32, I8), (F16, I8), (BF16, I8)]
TOLERANCE = {F32: 1e-5, F16: 4e-3, BF16: 3e-2}
SIZES = [64, 80, 96, 128, 8, 20]
HEADS = [(3, 1), (4, 4), (6, 2), (8, 1), (16, 2)]
ROWS = [1, 2, 5, 13, 40]
ATTRIBUTES: list[dict[str, float]] = [
    {},
    {"causal": 0},
    {"window": 7},
    {"softcap": 2.0},
    {"causal": 0, "window": 30, "softcap": 5.0, "scale": 0.3},
]


def check(
    library: Path, case: Case, *, mass: bool = True, in_place: bool = True, seed: int = 0, **attributes: float
) -> None:
    """Everything that comes out of a node: caches and scales bit for bit, the rest within the type's tolerance."""
    inputs = inputs_of(case, seed)
    want = expected(case, inputs, **attributes)
    options = (*case.options, "mass") if mass else case.options
    got = native_attention(library, inputs, *options, in_place=in_place, **attributes)
    kept = 4 if case.cache == I8 else 2
    for number, (found, wanted) in enumerate(zip(got, want if mass else want[:-1], strict=True)):
        if 0 < number <= kept:
            assert torch.equal(found, wanted), f"cache or scale {number} differs"
        else:
            allowed = TOLERANCE[case.dtype] if number == 0 else 2e-4
            torch.testing.assert_close(found.float(), wanted.float(), atol=allowed, rtol=allowed)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_every_type_size_and_group_is_the_reference(native_library: Path, types: tuple[torch.dtype, ...]) -> None:
    """All pairs of the lists, in turn; lengths are none, few, full, and the cache is written in place or copied."""
    for number, (size, heads, rows) in enumerate(itertools.product(SIZES, HEADS, ROWS)):
        if (number + number // len(ROWS)) % 8:
            continue
        case = Case(
            (0, 5, 96 - rows),
            rows,
            *heads,
            size=size,
            dtype=types[0],
            cache=types[1],
            width=20 if number % 3 == 0 else 0,
        )
        attributes = ATTRIBUTES[number // 5 % len(ATTRIBUTES)]
        check(native_library, case, in_place=number % 2 == 0, seed=number, mass=number % 4 < 3, **attributes)


@pytest.mark.parametrize("attributes", ATTRIBUTES, ids=str)
@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("cache", [F32, F16, I8], ids=str)
def test_attributes_over_many_blocks(
    native_library: Path, cache: torch.dtype, rows: int, attributes: dict[str, float]
) -> None:
    for width in (0, 300):
        case = Case((700, 0, 650), rows, 6, 2, capacity=731, cache=cache, width=width)
        check(native_library, case, **attributes)


@pytest.mark.parametrize("rows", [1, 9, 31], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("cache", [F32, F16, BF16, I8], ids=str)
def test_dead_slots_change_nothing(native_library: Path, cache: torch.dtype, rows: int) -> None:
    """Bit for bit, whatever finite numbers lie in slots that are dead, and whatever bias above length."""
    inputs = inputs_of(Case((40, 7), rows, cache=cache, dead=True))
    options = ("int8",) if cache == I8 else ()
    first = native_attention(native_library, inputs, *options)[0]
    for b, used in enumerate((40, 7)):
        for tensor in inputs[3:6]:
            tensor[b, :, used + rows :] = 3
            tensor[b, :, used : used + rows] = -5
        for tensor in inputs[3:5]:
            tensor[b, :, 1] = 0
    assert torch.equal(native_attention(native_library, inputs, *options)[0], first)


@pytest.mark.parametrize("cache", [F32, F16, I8], ids=str)
def test_a_prompt_gives_the_same_in_one_piece_and_in_several(native_library: Path, cache: torch.dtype) -> None:
    case = Case((10,), 48, cache=cache)
    inputs = inputs_of(case)
    options = case.options
    whole = native_attention(native_library, inputs, *options)
    pieces, state, start = [], inputs[3:5] + inputs[7:], 10
    for rows in (1, 30, 2, 15):
        new = [t[:, :, start - 10 : start - 10 + rows].contiguous() for t in inputs[:3]]
        bias = inputs[5].clone()
        bias[:, :, 10:] = 0
        given = [*new, *state[:2], bias, torch.tensor([start]), *state[2:]]
        output, *state = native_attention(native_library, given, *options)
        pieces.append(output)
        start += rows
    torch.testing.assert_close(torch.cat(pieces, 2), whole[0], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(state, whole[1:], strict=True))


def test_threads_change_nothing(native_library: Path) -> None:
    """Pieces follow from sizes alone: bit for bit the same on one thread and on three."""
    for case in (Case((1500, 3000), capacity=3100), Case((300,), 100, capacity=400)):
        inputs = inputs_of(case)
        one, three = (native_attention(native_library, inputs, "mass", threads=n) for n in (1, 3))
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_batch_rows_do_not_see_each_other(native_library: Path) -> None:
    inputs = inputs_of(Case((90, 3, 40), 2))
    together = native_attention(native_library, inputs)
    for b in range(3):
        alone = native_attention(native_library, [t[b : b + 1].contiguous() for t in inputs])
        torch.testing.assert_close(alone[0][0], together[0][b], atol=2e-6, rtol=2e-6)
        assert torch.equal(alone[1][0], together[1][b])


def test_a_merged_slot_is_so_many_equal_ones(native_library: Path) -> None:
    """Bias log n, as a core of n tokens has it."""
    many = inputs_of(Case((5,), capacity=9, dead=False))
    many[5].zero_()
    for cache in many[3:5]:
        cache[:, :, 1:5] = cache[:, :, 1:2]
    few = [t.clone() for t in many]
    few[5][:, :, 1] = math.log(4)
    few[6] = torch.tensor([2])
    got = native_attention(native_library, few)[0]
    torch.testing.assert_close(got, native_attention(native_library, many)[0], atol=2e-6, rtol=2e-6)


def refused(library: Path, change: dict[int, Tensor], case: Case) -> str:
    inputs = inputs_of(case)
    for number, tensor in change.items():
        inputs[number] = tensor
    with pytest.raises(Exception) as caught:
        native_attention(library, inputs, *case.options)
    return str(caught.value)


def test_rows_that_do_not_fit_are_refused(native_library: Path) -> None:
    message = refused(native_library, {6: torch.tensor([3, 95])}, Case((3, 94), 2))
    assert "semkv NexusAttention: the new rows do not fit the cache of batch row 1" in message
    assert "expected 0 <= length, length + 2 <= 96, got length 95" in message


def test_a_negative_length_is_refused(native_library: Path) -> None:
    assert "got length -1" in refused(native_library, {6: torch.tensor([-1])}, Case((3,)))


def test_a_slot_that_is_not_there_is_refused(native_library: Path) -> None:
    message = refused(native_library, {7: torch.full((1, 2, 9), 4)}, Case((4,), width=9))
    assert "slot_index names a slot of batch row 0 that is not there: expected less than length 4, got 4" in message


def test_sizes_that_disagree_are_refused(native_library: Path) -> None:
    message = refused(native_library, {5: torch.zeros(1, 2, 95)}, Case((4,)))
    assert "semkv NexusAttention: size C of slot_bias: expected 96, got [1,2,95]" in message


def test_heads_that_do_not_divide_are_refused(native_library: Path) -> None:
    message = refused(native_library, {}, Case((4,), heads=5, kv_heads=2))
    assert "query heads: expected a multiple of 2 KV heads, got 5" in message

"""SemanticBlockMap: give semantic blocks of any length a fixed-length form: a few vectors each, and a table of slots.

Inputs (B batch, Hkv KV heads, C capacity, D head size, N blocks; T float32, float16, bfloat16):
    key_cache     [B,Hkv,C,D]  T      rotary embedding applied; finite everywhere
    block_start   [B,N]        int64  first slot of each block; not looked at where the block is empty
    block_length  [B,N]        int64  slots of each block, 0: no block; at most max_block_length
Outputs:
    representatives  [B,Hkv,N,vectors,D]   T      what stands for a block's keys when blocks are scored; 0: no block
    block_slots      [B,N,max_block_length] int64  slots of each block, ascending, then -1
Attributes (a dimension named like an attribute has its value):
    vectors           int, 2: the smallest and the largest value of each channel, in this order; 1: the mean key.
    max_block_length  int, 40: longest block, in slots.

Smallest and largest values are exact; the mean is a float32 sum over the block's length, cast to T. Only slots
block_start .. block_start + block_length - 1 are read; blocks may come in any order and overlap.

Errors (reference only; the ONNX body does not check): SemkvError when shapes disagree, vectors is neither 1 nor 2, a
length is negative or above max_block_length, or a block reaches outside the cache.

Source: V2F of DynSplit-KV (arXiv 2602.03184), "a uniform mapping strategy that transforms variable-length semantic
blocks into a fixed-length format". The paper gives no equation for it that we could read. Ours: the representatives,
which are those of Quest (arXiv 2406.10774; 2) or the mean key (1); their type, T, because the block that is still open
is attended without being scored, so no running mean is ever kept; the table, padded to base block size + search radius
(32 + 8), which bounds every block, so that a selected block is a constant number of entries; 0 and -1 for no block.
A block that closes during decoding is mapped alone (N = 1), so a step never reads the whole cache.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops.spec import OperatorSpec, parse_function, register_torch_op, sizes, tensors

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

OP = OperatorSpec(
    name="SemanticBlockMap",
    inputs=tensors("key_cache B,Hkv,C,D T", "block_start B,N int64", "block_length B,N int64"),
    outputs=tensors("representatives B,Hkv,N,vectors,D T", "block_slots B,N,max_block_length int64"),
    attributes={"vectors": 2, "max_block_length": 40},
)


def reference(
    key_cache: Tensor, block_start: Tensor, block_length: Tensor, vectors: int = 2, max_block_length: int = 40
) -> tuple[Tensor, Tensor]:
    """The contract, one block at a time; float64 caches are computed in float64."""
    import torch

    inputs = (key_cache, block_start, block_length)
    dim = sizes([(spec.shape, t.shape) for spec, t in zip(OP.inputs, inputs, strict=True)])
    batch, heads, blocks, capacity = dim["B"], dim["Hkv"], dim["N"], dim["C"]
    if vectors not in (1, 2):
        raise SemkvError("wrong number of vectors a block", where=OP.name, expected="1 or 2", got=vectors)
    if bool(((block_length < 0) | (block_length > max_block_length)).any()):
        raise SemkvError(
            "block length out of range",
            where=OP.name,
            expected=f"0 to {max_block_length}",
            got=block_length.tolist(),
        )
    accumulate = torch.float64 if key_cache.dtype == torch.float64 else torch.float32
    representatives = key_cache.new_zeros(batch, heads, blocks, vectors, dim["D"])
    slots = block_start.new_full((batch, blocks, max_block_length), -1)
    for b in range(batch):
        for n, (start, length) in enumerate(zip(block_start[b].tolist(), block_length[b].tolist(), strict=True)):
            if length == 0:
                continue
            if start < 0 or start + length > capacity:
                raise SemkvError(
                    f"block {n} reaches outside the cache",
                    where=OP.name,
                    expected=f"slots 0 to {capacity - 1}",
                    got=f"{start} to {start + length - 1}",
                )
            slots[b, n, :length] = torch.arange(start, start + length, device=slots.device)
            keys = key_cache[b, :, start : start + length].to(accumulate)
            rows = [keys.mean(1)] if vectors == 1 else [keys.amin(1), keys.amax(1)]
            representatives[b, :, n] = torch.stack(rows, dim=1).to(key_cache.dtype)
    return representatives, slots


def fake(
    key_cache: Tensor, block_start: Tensor, block_length: Tensor, vectors: int = 2, max_block_length: int = 40
) -> tuple[Tensor, Tensor]:
    """Shapes and types only, for `torch.export`."""
    batch, heads, _, head_size = key_cache.shape
    blocks = block_start.shape[1]
    return (
        key_cache.new_empty((batch, heads, blocks, vectors, head_size)),
        block_start.new_empty((batch, blocks, max_block_length)),
    )


@functools.cache
def register_torch() -> None:
    """Register `torch.ops.semkv.semantic_block_map`; further calls do nothing."""
    register_torch_op(OP, reference, fake)


# A block shorter than max_block_length reads its last slot again, which changes neither its smallest nor its largest
# value, so that only the mean needs a mask. Mean, smallest and largest are rows 0, 1 and 2 of one tensor and `vectors`
# chooses row 0 or rows 1 and 2 of it: an If would be cheaper, but TensorRT refuses branches of different shapes.
_BODY = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  none = Constant <value_int = -1> ()
  single = Constant <value_ints = [1]> ()
  last_axis = Constant <value_ints = [-1]> ()
  row_axis = Constant <value_ints = [-2]> ()
  batch = Shape <start = 0, end = 1> (key_cache)
  heads = Shape <start = 1, end = 2> (key_cache)
  capacity = Shape <start = 2, end = 3> (key_cache)
  capacity_scalar = Squeeze (capacity)

  longest = Constant <value_int: int = @max_block_length> ()
  step = Range (zero, longest, one)
  start = Unsqueeze (block_start, last_axis)
  length = Unsqueeze (block_length, last_axis)
  is_slot = Less (step, length)
  slot = Add (start, step)
  block_slots = Where (is_slot, slot, none)

  last_step = Sub (length, one)
  step_read = Min (step, last_step)
  slot_read = Add (start, step_read)
  last_slot = Sub (capacity_scalar, one)
  slot_below_end = Min (slot_read, last_slot)
  slot_inside = Max (slot_below_end, zero)
  slot_of_head = Unsqueeze (slot_inside, single)
  row_count = Mul (batch, heads)
  row_total = Mul (row_count, capacity)
  row_total_scalar = Squeeze (row_total)
  head_start_flat = Range (zero, row_total_scalar, capacity_scalar)
  head_start_shape = Concat <axis = 0> (batch, heads, single, single)
  head_start = Reshape (head_start_flat, head_start_shape)
  row = Add (slot_of_head, head_start)
  key_rows = Flatten <axis = 3> (key_cache)
  key = Gather <axis = 0> (key_rows, row)
  key_f = Cast <to = 1> (key)

  smallest = ReduceMin <keepdims = 1> (key_f, row_axis)
  largest = ReduceMax <keepdims = 1> (key_f, row_axis)
  is_slot_f = Cast <to = 1> (is_slot)
  mask_axes = Constant <value_ints = [1, 3]> ()
  mask = Unsqueeze (is_slot_f, mask_axes)
  key_sum = MatMul (mask, key_f)
  length_or_one = Max (length, one)
  length_f = Cast <to = 1> (length_or_one)
  length_axes = Constant <value_ints = [1, 4]> ()
  length_column = Unsqueeze (length_f, length_axes)
  mean = Div (key_sum, length_column)
  rows = Concat <axis = 3> (mean, smallest, largest)
  vectors_given = Constant <value_int: int = @vectors> ()
  vectors = Reshape (vectors_given, single)
  first = Sub (vectors, one)
  end = Add (first, vectors)
  three = Constant <value_ints = [3]> ()
  chosen = Slice (rows, first, end, three)
  is_block = Greater (length, zero)
  is_block_f = Cast <to = 1> (is_block)
  block_factor = Unsqueeze (is_block_f, length_axes)
  chosen_or_zero = Mul (chosen, block_factor)
  representatives = CastLike (chosen_or_zero, key_cache)
"""


def function_proto() -> onnx.FunctionProto:
    """The operator's body in standard operators: one gather of the blocks' keys and three reductions over it."""
    return parse_function(OP, _BODY)

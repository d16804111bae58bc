"""CompactCache: move the named cache slots to the front, in the order named, and clear the rest.

Inputs (B batch, H KV heads, C capacity, D head size, G = 1: one list for all heads, G = H: a list per head;
T float32, float16, bfloat16):
    key_cache, value_cache  [B,H,C,D]  T   finite everywhere, dead slots included
    slot_bias   [B,H,C]  float32
    keep_index  [B,G,C]  int64  slots to keep, in their new order; negative: none (holes are allowed); below C
Outputs:
    key_cache_out, value_cache_out [B,H,C,D] T; slot_bias_out [B,H,C] float32
    length_out  [B]      int64  the largest number of slots kept by any group

Kept slots come out bit for bit: key, value and bias. All other slots: key and value 0; bias 0 from length_out on, and
-inf between a group's own count and length_out (per-head lists of unequal length).

Errors (reference only; the ONNX body does not check): SemkvError when shapes disagree, G is neither 1 nor H, or an
index is C or more.

Source: the last step of every eviction method (StreamingLLM, SnapKV) and of SONIC (arXiv 2601.21927).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops.spec import OperatorSpec, parse_function, register_torch_op, sizes, tensors

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

OP = OperatorSpec(
    name="CompactCache",
    inputs=tensors("key_cache B,H,C,D T", "value_cache B,H,C,D T", "slot_bias B,H,C float32", "keep_index B,G,C int64"),
    outputs=tensors(
        "key_cache_out B,H,C,D T", "value_cache_out B,H,C,D T", "slot_bias_out B,H,C float32", "length_out B int64"
    ),
)


def reference(
    key_cache: Tensor, value_cache: Tensor, slot_bias: Tensor, keep_index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The contract, one batch row and one head at a time."""
    import torch

    inputs = (key_cache, value_cache, slot_bias, keep_index)
    dim = sizes([(spec.shape, t.shape) for spec, t in zip(OP.inputs, inputs, strict=True)])
    heads, groups = dim["H"], dim["G"]
    if groups not in (1, heads):
        raise SemkvError(
            "keep_index has the wrong number of groups", where=OP.name, expected=f"1 or {heads}", got=groups
        )
    if bool((keep_index >= dim["C"]).any()):
        raise SemkvError(
            "keep_index names a slot outside the cache",
            where=OP.name,
            expected=f"below {dim['C']}",
            got=int(keep_index.max()),
        )
    keys, values, bias = torch.zeros_like(key_cache), torch.zeros_like(value_cache), torch.zeros_like(slot_bias)
    length = (keep_index >= 0).sum(dim=-1).amax(dim=-1)
    for b in range(dim["B"]):
        bias[b, :, : int(length[b])] = -math.inf
        for h in range(heads):
            wanted = keep_index[b, h * groups // heads]
            wanted = wanted[wanted >= 0]
            keys[b, h, : len(wanted)] = key_cache[b, h, wanted]
            values[b, h, : len(wanted)] = value_cache[b, h, wanted]
            bias[b, h, : len(wanted)] = slot_bias[b, h, wanted]
    return keys, values, bias, length


def fake(
    key_cache: Tensor, value_cache: Tensor, slot_bias: Tensor, keep_index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and types only, for `torch.export`."""
    import torch

    return (
        torch.empty_like(key_cache),
        torch.empty_like(value_cache),
        torch.empty_like(slot_bias),
        keep_index.new_empty((keep_index.shape[0],)),
    )


@functools.cache
def register_torch() -> None:
    """Register `torch.ops.semkv.compact_cache`; further calls do nothing."""
    register_torch_op(OP, reference, fake)


# Holes are closed in the index list first, which is small; the caches are then gathered once. Where there is a hole,
# the last slot is dead, so everything skipped is written there. Dead rows are cleared by a product: Where is an order
# of magnitude slower in ONNX Runtime.
_BODY = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  none = Constant <value_int = -1> ()
  zero_f = Constant <value_float = 0.0> ()
  minus_infinity = Constant <value_float = -inf> ()
  last_axis = Constant <value_ints = [-1]> ()
  slot_axes = Constant <value_ints = [1, 2]> ()
  batch = Shape <start = 0, end = 1> (key_cache)
  heads = Shape <start = 1, end = 2> (key_cache)
  capacity = Shape <start = 2, end = 3> (key_cache)
  capacity_scalar = Squeeze (capacity)
  slot = Range (zero, capacity_scalar, one)

  is_kept = GreaterOrEqual (keep_index, zero)
  is_kept_number = Cast <to = 7> (is_kept)
  kept_so_far = CumSum (is_kept_number, none)
  place_kept = Sub (kept_so_far, one)
  last_slot = Sub (capacity_scalar, one)
  place = Where (is_kept, place_kept, last_slot)
  index_shape = Shape (keep_index)
  no_source = Expand (none, index_shape)
  source = ScatterElements <axis = -1> (no_source, place, keep_index)
  group_count = ReduceSum <keepdims = 0> (is_kept_number, last_axis)
  length_out = ReduceMax <keepdims = 0> (group_count, last_axis)

  row_total = Size (slot_bias)
  head_start_flat = Range (zero, row_total, capacity_scalar)
  one_dim = Constant <value_ints = [1]> ()
  head_start_shape = Concat <axis = 0> (batch, heads, one_dim)
  head_start = Reshape (head_start_flat, head_start_shape)
  source_or_first = Max (source, zero)
  row = Add (source_or_first, head_start)
  has_source = GreaterOrEqual (source, zero)
  has_source_t = CastLike (has_source, key_cache)
  row_factor = Unsqueeze (has_source_t, last_axis)

  key_rows = Flatten <axis = 3> (key_cache)
  key_moved = Gather <axis = 0> (key_rows, row)
  key_cache_out = Mul (key_moved, row_factor)
  value_rows = Flatten <axis = 3> (value_cache)
  value_moved = Gather <axis = 0> (value_rows, row)
  value_cache_out = Mul (value_moved, row_factor)

  bias_flat = Reshape (slot_bias, last_axis)
  bias_moved = Gather <axis = 0> (bias_flat, row)
  length_column = Unsqueeze (length_out, slot_axes)
  below_length = Less (slot, length_column)
  empty_bias = Where (below_length, minus_infinity, zero_f)
  slot_bias_out = Where (has_source, bias_moved, empty_bias)
"""


def function_proto() -> onnx.FunctionProto:
    """The operator's body in standard operators."""
    return parse_function(OP, _BODY)

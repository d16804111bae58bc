"""NexusAttention: append rows to a static KV cache, then attend over it with one bias per slot.

Inputs (B batch, Hq query heads, Hkv key/value heads, S new rows, C capacity, D head size; T float32, float16,
bfloat16):
    query        [B,Hq,S,D]   T      rotary embedding applied
    key, value   [B,Hkv,S,D]  T      rotary embedding applied (key)
    key_cache, value_cache  [B,Hkv,C,D]  T
    slot_bias    [B,Hkv,C]    float32  added to the logits of the slots below `length`: log(cluster size), 0, or
                                       -inf (dead)
    length       [B]          int64    live slots per batch row, in rows; the caller guarantees length + S <= C
Outputs:
    output       [B,Hq,S,D]   T
    key_cache_out, value_cache_out  [B,Hkv,C,D]  T   the caches with the new rows in slots length .. length+S-1
Attributes:
    scale    float, 0: 1/sqrt(D).
    causal   int, 1: row r, which sits at slot p = length + r, sees slot j iff j <= p; 0: iff j < length + S.
    softcap  float, 0: off; c: logits become c * tanh(logit / c), before the bias is added (Gemma 2).
    window   int, 0: off; w: row r sees slot j only if p - j < w.

    logit(r, j) = softcap(scale * q_r . k_j) + (slot_bias[j] if j < length else 0)

Query head h uses key/value head h // (Hq/Hkv). Slots at and above length + S are dead: any finite content of the caches
there, and any bias, changes nothing; so does a slot below length whose bias is -inf. Logits, softmax and the weighted
sum are float32; the output is cast to T.

Source: proportional attention of SemantiCache (arXiv 2603.14303, eq. 4: softmax(q.K/sqrt(d) + log s) V) and the Nexus
tokens of SONIC, on a cache whose shape never changes.
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
    name="NexusAttention",
    inputs=tensors(
        "query B,Hq,S,D T",
        "key B,Hkv,S,D T",
        "value B,Hkv,S,D T",
        "key_cache B,Hkv,C,D T",
        "value_cache B,Hkv,C,D T",
        "slot_bias B,Hkv,C float32",
        "length B int64",
    ),
    outputs=tensors("output B,Hq,S,D T", "key_cache_out B,Hkv,C,D T", "value_cache_out B,Hkv,C,D T"),
    attributes={"scale": 0.0, "causal": 1, "softcap": 0.0, "window": 0},
)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_bias: Tensor,
    length: Tensor,
    scale: float = 0.0,
    causal: int = 1,
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract, one batch row and one query head at a time; float64 inputs are computed in float64.

    Raises SemkvError when shapes disagree, Hq is not a multiple of Hkv, or length + S > C.
    """
    import torch

    inputs = (query, key, value, key_cache, value_cache, slot_bias, length)
    dim = sizes([(spec.shape, t.shape) for spec, t in zip(OP.inputs, inputs, strict=True)])
    rows, capacity = dim["S"], dim["C"]
    if dim["Hq"] % dim["Hkv"]:
        raise SemkvError(
            "query heads must be a multiple of KV heads", where=OP.name, expected=dim["Hkv"], got=dim["Hq"]
        )
    if bool(((length < 0) | (length + rows > capacity)).any()):
        raise SemkvError(
            "the new rows do not fit the cache",
            where=OP.name,
            expected=f"length + {rows} <= {capacity}",
            got=length.tolist(),
        )
    group = dim["Hq"] // dim["Hkv"]
    factor = scale or 1.0 / math.sqrt(dim["D"])
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = torch.empty_like(query)
    keys, values = key_cache.clone(), value_cache.clone()
    slots = torch.arange(capacity, device=query.device)
    for b, start in enumerate(length.tolist()):
        keys[b, :, start : start + rows] = key[b]
        values[b, :, start : start + rows] = value[b]
        position = torch.arange(start, start + rows, device=query.device)[:, None]
        visible = slots[None, :] <= position if causal else (slots < start + rows).expand(rows, capacity)
        if window > 0:
            visible = visible & (position - slots[None, :] < window)
        for h in range(dim["Hq"]):
            k, v = keys[b, h // group].to(accumulate), values[b, h // group].to(accumulate)
            bias = torch.where(slots < start, slot_bias[b, h // group].to(accumulate), 0.0)
            logits = factor * (query[b, h].to(accumulate) @ k.T)
            if softcap > 0:
                logits = softcap * torch.tanh(logits / softcap)
            seen = visible & (bias > -math.inf)
            logits = torch.where(seen, logits + bias, -math.inf)
            output[b, h] = (torch.softmax(logits, dim=-1) @ v).to(query.dtype)
    return output, keys, values


def fake(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and types only, for `torch.export`."""
    import torch

    return torch.empty_like(query), torch.empty_like(key_cache), torch.empty_like(value_cache)


@functools.cache
def register_torch() -> None:
    """Register `torch.ops.semkv.nexus_attention`; further calls do nothing."""
    register_torch_op(OP, reference, fake)


# Query heads that share a KV head become rows of one matrix, so the cache is never repeated. The scale (and the soft
# cap's division) go into the query, which is smaller than the logits. Masked logits are replaced, never added to: with
# large garbage in a dead slot q.k may be inf or NaN.
_BODY = """
  key_cache_out = TensorScatter <axis = -2, mode = "linear"> (key_cache, key, length)
  value_cache_out = TensorScatter <axis = -2, mode = "linear"> (value_cache, value, length)

  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  before_first = Constant <value_int = -1> ()
  off = Constant <value_float = 0.0> ()
  unit = Constant <value_float = 1.0> ()
  minus_infinity = Constant <value_float = -inf> ()
  rest = Constant <value_ints = [-1]> ()
  batch = Shape <start = 0, end = 1> (query)
  kv_heads = Shape <start = 1, end = 2> (key)
  rows = Shape <start = 2, end = 3> (query)
  head_size = Shape <start = 3, end = 4> (query)
  capacity = Shape <start = 2, end = 3> (key_cache)
  query_shape = Shape (query)
  folded_shape = Concat <axis = 0> (batch, kv_heads, rest, head_size)
  logits_shape = Concat <axis = 0> (batch, kv_heads, rest, rows, capacity)
  weights_shape = Concat <axis = 0> (batch, kv_heads, rest, capacity)

  scale_given = Constant <value_float: float = @scale> ()
  head_size_f = Cast <to = 1> (head_size)
  head_size_root = Sqrt (head_size_f)
  scale_default = Reciprocal (head_size_root)
  scale_is_default = Equal (scale_given, off)
  scale_used = Where (scale_is_default, scale_default, scale_given)
  softcap_given = Constant <value_float: float = @softcap> ()
  softcap_on = Greater (softcap_given, off)
  softcap_used = Where (softcap_on, softcap_given, unit)
  query_factor = Div (scale_used, softcap_used)

  query_f = Cast <to = 1> (query)
  query_scaled = Mul (query_f, query_factor)
  query_folded = Reshape (query_scaled, folded_shape)
  key_f = Cast <to = 1> (key_cache_out)
  key_transposed = Transpose <perm = [0, 1, 3, 2]> (key_f)
  products = MatMul (query_folded, key_transposed)
  products_squashed = Tanh (products)
  products_chosen = Where (softcap_on, products_squashed, products)
  products_capped = Mul (products_chosen, softcap_used)
  logits = Reshape (products_capped, logits_shape)

  capacity_scalar = Squeeze (capacity)
  rows_scalar = Squeeze (rows)
  slot = Range (zero, capacity_scalar, one)
  row = Range (zero, rows_scalar, one)
  row_axes = Constant <value_ints = [1]> ()
  row_column = Unsqueeze (row, row_axes)
  length_axes = Constant <value_ints = [1, 2, 3, 4]> ()
  start = Unsqueeze (length, length_axes)
  position = Add (start, row_column)
  position_end = Add (position, one)
  append_end = Add (start, rows)
  causal_given = Constant <value_int: int = @causal> ()
  causal_on = Greater (causal_given, zero)
  visible_end = Where (causal_on, position_end, append_end)
  window_given = Constant <value_int: int = @window> ()
  window_on = Greater (window_given, zero)
  window_edge = Sub (position, window_given)
  visible_after = Where (window_on, window_edge, before_first)
  before_end = Less (slot, visible_end)
  inside_window = Greater (slot, visible_after)
  visible = And (before_end, inside_window)

  bias_axes = Constant <value_ints = [2, 3]> ()
  slot_bias_5d = Unsqueeze (slot_bias, bias_axes)
  is_old = Less (slot, start)
  bias = Where (is_old, slot_bias_5d, off)
  is_live = Greater (bias, minus_infinity)
  seen = And (visible, is_live)
  logits_biased = Add (logits, bias)
  logits_masked = Where (seen, logits_biased, minus_infinity)
  weights = Softmax <axis = -1> (logits_masked)

  weights_folded = Reshape (weights, weights_shape)
  value_f = Cast <to = 1> (value_cache_out)
  output_folded = MatMul (weights_folded, value_f)
  output_f = Reshape (output_folded, query_shape)
  output = CastLike (output_f, query)
"""


def function_proto() -> onnx.FunctionProto:
    """The operator's body in standard operators: TensorScatter, two float32 MatMuls and a float32 Softmax."""
    return parse_function(OP, _BODY)

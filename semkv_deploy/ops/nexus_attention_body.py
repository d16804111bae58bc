"""NexusAttention's body in standard ONNX operators, put together from what the options of a node ask for."""

from __future__ import annotations

CODE_LIMIT = {"int8": 127.0, "fp8": 448.0}
"""Largest code of a quantised cache: what the largest magnitude of a row is stored as."""

# Query heads that share a KV head become rows of one matrix, so the cache is never repeated. The scale (and the soft
# cap's division) go into the query, which is smaller than the logits. Masked logits are replaced, never added to: with
# large garbage in a dead slot q.k may be inf or NaN.
_BODY = """{append}
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
{index}  query_shape = Shape (query)
  folded_shape = Concat <axis = 0> (batch, kv_heads, rest, head_size)
  logits_shape = Concat <axis = 0> (batch, kv_heads, rest, rows, {columns})
  weights_shape = Concat <axis = 0> (batch, kv_heads, rest, {columns})

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
{key_read}  key_transposed = Transpose <perm = [0, 1, 3, 2]> (key_f)
  products = MatMul (query_folded, key_transposed)
  products_squashed = Tanh (products)
  products_chosen = Where (softcap_on, products_squashed, products)
  products_capped = Mul (products_chosen, softcap_used)
  logits = Reshape (products_capped, logits_shape)

  capacity_scalar = Squeeze (capacity)
  rows_scalar = Squeeze (rows)
{slot}  row = Range (zero, rows_scalar, one)
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
{inside_window}  visible = And (before_end, inside_window)

  bias_axes = Constant <value_ints = [2, 3]> ()
  slot_bias_5d = Unsqueeze ({slot_bias}, bias_axes)
  is_old = Less (slot, start)
  bias = Where (is_old, slot_bias_5d, off)
  is_live = Greater (bias, minus_infinity)
  seen = And (visible, is_live)
  logits_biased = Add (logits, bias)
  logits_masked = Where (seen, logits_biased, minus_infinity)
  weights = Softmax <axis = -1> (logits_masked)

  weights_folded = Reshape (weights, weights_shape)
{value_read}  output_folded = MatMul (weights_folded, value_f)
  output_f = Reshape (output_folded, query_shape)
  output = CastLike (output_f, query)
{mass}"""

_APPEND = """
  {x}_cache_out = TensorScatter <axis = -2, mode = "linear"> ({x}_cache, {x}, length)
"""

_APPEND_CODES = """
  {x}_new = Cast <to = 1> ({x})
  {x}_sizes = Abs ({x}_new)
  {x}_largest = ReduceMax <keepdims = 1> ({x}_sizes, last_axis)
  {x}_step = Div ({x}_largest, code_limit)
  {x}_is_some = Greater ({x}_step, no_step)
  {x}_divisor = Where ({x}_is_some, {x}_step, unit_step)
  {x}_ratio = Div ({x}_new, {x}_divisor)
  {x}_steps = Squeeze ({x}_step, last_axis)
  {x}_scale_out = TensorScatter <axis = -1, mode = "linear"> ({x}_scale, {x}_steps, length)
"""

# Its own constants: it comes before those of the body.
_CODE_CONSTANTS = """
  code_limit = Constant <value_float = {limit}> ()
  code_floor = Constant <value_float = -{limit}> ()
  no_step = Constant <value_float = 0.0> ()
  unit_step = Constant <value_float = 1.0> ()
  last_axis = Constant <value_ints = [-1]> ()
"""

_CODES = {
    "int8": """
  {x}_rounded = Round ({x}_ratio)
  {x}_clipped = Clip ({x}_rounded, code_floor, code_limit)
  {x}_codes = Cast <to = 3> ({x}_clipped)
  {x}_cache_out = TensorScatter <axis = -2, mode = "linear"> ({x}_cache, {x}_codes, length)
""",
    # Cast there and back around TensorScatter, which ONNX Runtime 1.32 does not have for this type.
    "fp8": """
  {x}_clipped = Clip ({x}_ratio, code_floor, code_limit)
  {x}_codes = Cast <to = 17> ({x}_clipped)
  {x}_codes_f = Cast <to = 1> ({x}_codes)
  {x}_cache_f = Cast <to = 1> ({x}_cache)
  {x}_cache_out_f = TensorScatter <axis = -2, mode = "linear"> ({x}_cache_f, {x}_codes_f, length)
  {x}_cache_out = Cast <to = 17> ({x}_cache_out_f)
""",
}

# Slots to read: the named old ones, -1 where none is named, then the new ones. Everything is gathered from the updated
# caches, so that no reader of the old ones is left.
_INDEX = """
  width = Shape <start = 2, end = 3> (slot_index)
  columns = Add (width, rows)
  start_axes = Constant <value_ints = [1, 2]> ()
  first_new = Unsqueeze (length, start_axes)
  rows_end = Squeeze (rows)
  new_row = Range (zero, rows_end, one)
  new_slot = Add (first_new, new_row)
  new_shape = Concat <axis = 0> (batch, kv_heads, rows)
  new_slots = Expand (new_slot, new_shape)
  is_slot = Greater (slot_index, before_first)
  is_below = Less (slot_index, first_new)
  is_named = And (is_slot, is_below)
  old_slots = Where (is_named, slot_index, before_first)
  slots_read = Concat <axis = 2> (old_slots, new_slots)
  gather_at = Max (slots_read, zero)
  gather_rows = Unsqueeze (gather_at, rest)
  slot_axes = Constant <value_ints = [2, 3]> ()
  slot = Unsqueeze (slots_read, slot_axes)
  slot_bias_read = GatherElements <axis = 2> (slot_bias, gather_at)
"""

_INSIDE_WINDOW = """
  inside_window = Greater (slot, visible_after)
"""

_INSIDE_WINDOW_INDEXED = """
  above_edge = Greater (slot, visible_after)
  names_slot = Greater (slot, before_first)
  inside_window = And (above_edge, names_slot)
"""

_MASS = """
  mass_axes = Constant <value_ints = [2, 3]> ()
  attention_mass = ReduceSum <keepdims = 0> (weights, mass_axes)
"""

_MASS_INDEXED = """
  mass_axes = Constant <value_ints = [2, 3]> ()
  mass_read = ReduceSum <keepdims = 0> (weights, mass_axes)
  mass_shape = Concat <axis = 0> (batch, kv_heads, capacity)
  no_mass = ConstantOfShape (mass_shape)
  attention_mass = ScatterElements <axis = 2, reduction = "add"> (no_mass, gather_at, mass_read)
"""


def body(*options: str) -> str:
    """The body's text. Its signature is `OP.with_options(*options)`'s."""
    indexed = "indexed" in options
    codes = next((option for option in options if option in CODE_LIMIT), "")
    return _BODY.format(
        append=_append(codes),
        index=_INDEX if indexed else "",
        columns="columns" if indexed else "capacity",
        slot="" if indexed else "  slot = Range (zero, capacity_scalar, one)\n",
        slot_bias="slot_bias_read" if indexed else "slot_bias",
        inside_window=_INSIDE_WINDOW_INDEXED if indexed else _INSIDE_WINDOW,
        key_read=_read("key", indexed, codes),
        value_read=_read("value", indexed, codes),
        mass=(_MASS_INDEXED if indexed else _MASS) if "mass" in options else "",
    )


def _append(codes: str) -> str:
    if not codes:
        return "".join(_APPEND.format(x=x) for x in ("key", "value"))
    text = (_APPEND_CODES + _CODES[codes]).format
    return _CODE_CONSTANTS.format(limit=CODE_LIMIT[codes]) + text(x="key") + text(x="value")


def _read(x: str, indexed: bool, codes: str) -> str:
    """`<x>_f`: the rows that attention reads, float32 and times their scales."""
    rows, lines = f"{x}_cache_out_f" if codes == "fp8" else f"{x}_cache_out", []
    if indexed:
        lines.append(f"{x}_rows = GatherND <batch_dims = 2> ({rows}, gather_rows)")
        rows = f"{x}_rows"
    if not codes:
        lines.append(f"{x}_f = Cast <to = 1> ({rows})")
        return "".join(f"  {line}\n" for line in lines)
    scale = f"{x}_scale_out"
    if indexed:
        lines.append(f"{x}_scale_read = GatherElements <axis = 2> ({scale}, gather_at)")
        scale = f"{x}_scale_read"
    lines += [
        f"{x}_codes_read = Cast <to = 1> ({rows})",
        f"{x}_scale_column = Unsqueeze ({scale}, rest)",
        f"{x}_f = Mul ({x}_codes_read, {x}_scale_column)",
    ]
    return "".join(f"  {line}\n" for line in lines)

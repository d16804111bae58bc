"""`SemanticCluster` in what TensorRT builds: no scatter with a reduction, no loop inside a loop or a condition.

It shares its arithmetic with the portable body and differs in three things: the levels are tried side by side, not one
after the other; every row is computed and the rows that fit are put back; sums over a cluster are products with a
banded matrix, seeds in blocks against the window of slots that can belong to them. ONNX Runtime takes several times as
long for it as for the portable body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from semkv_deploy.ops.semantic_cluster import BLOCKS, OP, PLACES, SIMILARITY
from semkv_deploy.ops.spec import parse_function

if TYPE_CHECKING:
    import onnx

_BODY = """
      zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()  none = Constant <value_int = -1> ()
      slot_axes = Constant <value_ints = [1, 2]> ()
      batch = Shape <start = 0, end = 1> (key_cache)  capacity = Shape <start = 2, end = 3> (key_cache)
      groups = Shape <start = 1, end = 2> (chunk_id)  group_shape = Concat <axis = 0> (batch, groups, capacity)
      capacity_scalar = Squeeze (capacity)  slot = Range (zero, capacity_scalar, one)
      length_column = Unsqueeze (length, slot_axes)  is_used = Less (slot, length_column)
      used_slot = Where (is_used, slot, none)
      most_kept = Max (target, zero)  is_over = Greater (length, most_kept)
"""

# As the portable body's, with an axis for the level before that of the blocks.
_LEVELS = """
      level_axis = Constant <value_ints = [2]> ()  level_axes = Constant <value_ints = [1, 2, 3]> ()
      group_bias = Slice (slot_bias, keep, groups, single)  is_finite = Greater (group_bias, minus_infinity)
      is_live = And (is_used, is_finite)  row_over = Unsqueeze (is_over, slot_axes)
      known_chunk = Max (chunk_id, none)  has_chunk = GreaterOrEqual (chunk_id, zero)
      is_live_level = Unsqueeze (is_live, level_axis)  may_seed_flat = And (is_live_level, has_chunk)
      level_block_shape = Concat <axis = 0> (keep, keep, keep, rest, single, block_size)
      level_row_shape = Concat <axis = 0> (keep, keep, keep, keep, single, window)
      level_column_shape = Concat <axis = 0> (keep, keep, keep, keep, window, single)
      may_seed = Reshape (may_seed_flat, level_block_shape)
      joiner_chunk = Reshape (known_chunk, level_block_shape)
      candidate_chunk_parts = Gather <axis = 3> (joiner_chunk, part)
      candidate_chunk_real = Min (candidate_chunk_parts, part_chunk_limit)
      candidate_chunk = Reshape (candidate_chunk_real, level_column_shape)
      threshold_column = Unsqueeze (head_thresholds, level_axes)  limit = Add (band_offset, threshold_column)
      similarity_level = Unsqueeze (similarity, level_axis)  is_similar = Greater (similarity_level, limit)
      is_same_chunk = Equal (candidate_chunk, joiner_chunk)  is_absorbed = And (is_similar, is_same_chunk)
      absorbs = Cast <to = 1> (is_absorbed)

      yes = Constant <value = bool {1}> ()  seeds_first = Cast <to = 1> (may_seed)
      seeds = Loop (capacity_scalar, yes, seeds_first) <
        body: graph = two_rounds (int64 round, bool round_on, float[] even) => (is_changing, odd_to_even) {
          even_parts = Gather <axis = 3> (even, part)  even_row = Reshape (even_parts, level_row_shape)
          even_hits = MatMul (even_row, absorbs)  even_free = Equal (even_hits, zero_f)
          is_odd_seed = And (even_free, may_seed)  odd = Cast <to = 1> (is_odd_seed)
          odd_parts = Gather <axis = 3> (odd, part)  odd_row = Reshape (odd_parts, level_row_shape)
          odd_hits = MatMul (odd_row, absorbs)  odd_free = Equal (odd_hits, zero_f)
          is_next_seed = And (odd_free, may_seed)  odd_to_even = Cast <to = 1> (is_next_seed)
          odd_count = ReduceSum <keepdims = 0> (odd)  next_count = ReduceSum <keepdims = 0> (odd_to_even)
          is_changing = Greater (next_count, odd_count)
        }
      >
      seed_parts = Gather <axis = 3> (seeds, part)  seed_column = Reshape (seed_parts, level_column_shape)
      seed_earliness = Mul (seed_column, earliness)  absorber_earliness = Mul (absorbs, seed_earliness)
      candidate_axis = Constant <value_ints = [-2]> ()
      best_absorber = ReduceMax <keepdims = 1> (absorber_earliness, candidate_axis)
      best_owner = Max (best_absorber, own_earliness)  owner_left = Cast <to = 7> (best_owner)
      owner_block = Sub (block_end, owner_left)  level_shape = Shape (chunk_id)
      owner_found = Reshape (owner_block, level_shape)

      is_own_found = Equal (owner_found, slot)  is_seed_found = And (is_live_level, is_own_found)
      is_seed_found_number = Cast <to = 7> (is_seed_found)
      group_count = ReduceSum <keepdims = 0> (is_seed_found_number, last_axis)
      count_found = ReduceMax <keepdims = 0> (group_count, single)
      target_column = Unsqueeze (target, single)  fits = LessOrEqual (count_found, target_column)
      level_total_1 = Shape <start = 2, end = 3> (chunk_id)  level_total = Squeeze (level_total_1)
      level_number = Range (zero, level_total, one)  last_level = Sub (level_total, one)
      level_if_fits = Where (fits, level_number, last_level)
      level_taken_column = ReduceMin <keepdims = 1> (level_if_fits, single)
      level_taken = Squeeze (level_taken_column, single)  new_level = Where (is_over, level_taken, none)
      count_taken_column = GatherElements <axis = 1> (count_found, level_taken_column)
      count_taken = Squeeze (count_taken_column, single)  new_length = Where (is_over, count_taken, length)
      level_taken_axes = Unsqueeze (level_taken_column, part_axes)
      one_level_shape = Concat <axis = 0> (batch, groups, single, capacity)
      level_index = Expand (level_taken_axes, one_level_shape)
      owner_taken_level = GatherElements <axis = 2> (owner_found, level_index)
      owner_taken = Squeeze (owner_taken_level, level_axis)  owner = Where (row_over, owner_taken, slot)
"""

_TOTAL = """
      block_total = Div (capacity_scalar, block_size_scalar)  last_block = Sub (block_total, one)
      later_wanted = Add (block_column, part_number)  later = Min (later_wanted, last_block)
      later_exists_flat = LessOrEqual (later_wanted, last_block)
      later_exists = Unsqueeze (later_exists_flat, part_axes)
      owner_blocks = Reshape (owner_kept, block_shape)  owner_parts = Gather <axis = 2> (owner_blocks, later)
      owner_real = Where (later_exists, owner_parts, none)  owner_row = Reshape (owner_real, candidate_row_shape)
      weight_blocks = Reshape (weight, block_shape)  weight_parts = Gather <axis = 2> (weight_blocks, later)
      weight_row = Reshape (weight_parts, candidate_row_shape)
      seed_column_shape = Concat <axis = 0> (rest, block_size, single)
      seed_slot = Reshape (slot, seed_column_shape)  is_member = Equal (owner_row, seed_slot)
      member = Cast <to = 1> (is_member)  member_weight = Mul (member, weight_row)
      member_total = ReduceSum <keepdims = 0> (member_weight, last_axis)
      total_or_none = Reshape (member_total, group_shape)
"""

_MERGE = """
      cache_shape = Shape (key_cache)  row_total = Size (slot_bias)
      head_start_flat = Range (zero, row_total, capacity_scalar)
      head_start_shape = Concat <axis = 0> (batch, heads, single)
      head_start = Reshape (head_start_flat, head_start_shape)
      source_or_first = Max (source, zero)  source_row = Add (head_start, source_or_first)
      has_source_t = CastLike (has_source, key_cache)  source_factor = Unsqueeze (has_source_t, last_axis)
      member_count = ReduceSum <keepdims = 0> (member, last_axis)  one_f = Constant <value_float = 1.0> ()
      is_merged_blocks = Greater (member_count, one_f)  is_merged_flat = Reshape (is_merged_blocks, group_shape)
      is_merged = Unsqueeze (is_merged_flat, last_axis)
      total_column_shape = Concat <axis = 0> (keep, keep, rest, block_size, single)
      total_column = Reshape (total, total_column_shape)  member_share = Div (member_weight, total_column)
      rows_block_shape = Concat <axis = 0> (keep, keep, rest, block_size, head_size)
      rows_window_shape = Concat <axis = 0> (keep, keep, keep, window, head_size)

      key_blocks = Reshape (key_f, rows_block_shape)  key_parts = Gather <axis = 2> (key_blocks, later)
      key_window = Reshape (key_parts, rows_window_shape)  key_means = MatMul (member_share, key_window)
      key_mean_f = Reshape (key_means, cache_shape)  key_mean = CastLike (key_mean_f, key_cache)
      key_merged = Where (is_merged, key_mean, key_cache)  key_rows = Flatten <axis = 3> (key_merged)
      key_moved = Gather <axis = 0> (key_rows, source_row)  new_key = Mul (key_moved, source_factor)

      value_f = Cast <to = 1> (value_cache)  value_blocks = Reshape (value_f, rows_block_shape)
      value_parts = Gather <axis = 2> (value_blocks, later)  value_window = Reshape (value_parts, rows_window_shape)
      value_means = MatMul (member_share, value_window)  value_mean_f = Reshape (value_means, cache_shape)
      value_mean = CastLike (value_mean_f, value_cache)  value_merged = Where (is_merged, value_mean, value_cache)
      value_rows = Flatten <axis = 3> (value_merged)  value_moved = Gather <axis = 0> (value_rows, source_row)
      new_value = Mul (value_moved, source_factor)
"""

_RESULTS = {
    "key_cache_out": "new_key",
    "value_cache_out": "new_value",
    "slot_bias_out": "new_bias",
    "length_out": "new_length",
    "source_slot": "new_source",
    "level": "new_level",
}


def function_proto() -> onnx.FunctionProto:
    """The operator's body for TensorRT; every shape follows from the input shapes."""
    results = "\n".join(f"{name} = Identity ({value})" for name, value in _RESULTS.items())
    places = PLACES.replace("TOTAL", _TOTAL)
    return parse_function(OP, _BODY + BLOCKS + SIMILARITY + _LEVELS + places + _MERGE + results)

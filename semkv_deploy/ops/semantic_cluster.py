"""SemanticCluster: merge similar cache slots of one semantic chunk into cores, in place of their first member.

Inputs (B batch, H KV heads, C capacity, D head size, L levels, G = 1: clusters shared by all heads, G = H: per head;
T float32, float16, bfloat16):
    key_cache, value_cache  [B,H,C,D]  T
    slot_bias   [B,H,C]    float32  log weight of a slot; -inf: dead. With G = 1 all heads are equal; head 0 is read
    length      [B]        int64    slots in use
    chunk_id    [B,G,L,C]  int64    chunk of each slot at each level; negative: the slot stays as it is
    thresholds  [L]        float32  cosine a slot must exceed to join, one per level; 1 or more: nothing joins
    target      [B]        int64    length wanted, in slots
Outputs:
    key_cache_out, value_cache_out [B,H,C,D] T; slot_bias_out [B,H,C] float32; length_out [B] int64
    source_slot [B,G,C]  int64  old slot of each new slot's first member (its seed); -1: the new slot is dead
    level       [B]      int64  level used; -1: the row already fitted and nothing changed
Attribute:
    span  int, 64: slots join a seed less than `span` slots before them. C must be a multiple of span.

Per batch row:
* A slot is live when it lies below length and its bias is above -inf.
* length <= target, or length 0 whatever the target: the caches and biases come out bit-identical, source_slot[j] = j
  below length, level = -1.
* Otherwise levels are tried in order until the new length (the largest number of clusters over the groups) is at most
  the target; when none is, the last level's clusters are used and length_out exceeds the target: the caller decides.
* Clusters at one level (SemantiCache, arXiv 2603.14303, algorithm 1, in its equivalent streaming form): live slots in
  order; slot j with chunk_id >= 0 joins the earliest seed i with the same chunk_id, j - i < span and
  Sim(i, j) > threshold, strictly; else it becomes a seed. A negative chunk_id is a cluster of its own.
  Sim is the cosine of the keys (norms floored at 1e-12), in float32; with G = 1, its mean over the heads.
* Clusters go to slots 0, 1, ... in the order of their seeds. With weights s = exp(slot_bias), key = sum(s k) / sum(s),
  value likewise (float32, then cast to T), bias = log(sum(s)) (equations 3 and 4, in weighted form so that cores can be
  merged again). A cluster of one is copied bit for bit.
* Slots that hold no cluster: key and value 0, source_slot -1, and bias 0 from length_out on; below it (per-head groups
  of unequal length) bias -inf.

Errors (reference only): SemkvError when shapes disagree, G is neither 1 nor H, or C is not a multiple of span.
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
    name="SemanticCluster",
    inputs=tensors(
        "key_cache B,H,C,D T",
        "value_cache B,H,C,D T",
        "slot_bias B,H,C float32",
        "length B int64",
        "chunk_id B,G,L,C int64",
        "thresholds L float32",
        "target B int64",
    ),
    outputs=tensors(
        "key_cache_out B,H,C,D T",
        "value_cache_out B,H,C,D T",
        "slot_bias_out B,H,C float32",
        "length_out B int64",
        "source_slot B,G,C int64",
        "level B int64",
    ),
    attributes={"span": 64},
)


def greedy_clusters(
    unit_keys: Tensor, live: Tensor, chunk: Tensor, threshold: float, span: int
) -> dict[int, list[int]]:
    """Seeds and their members (seed first), in slot order, of one group.

    Args:
        unit_keys: [P,C,D], the keys of the group's P heads, normalised.
        live: [C] bool. chunk: [C] int64.
    """
    clusters: dict[int, list[int]] = {}
    for j in range(len(live)):
        if not live[j]:
            continue
        near = [i for i in clusters if chunk[j] >= 0 and chunk[i] == chunk[j] and j - i < span]
        # Rounding can lift the cosine of equal keys above 1.
        similar = (i for i in near if threshold < 1 and (unit_keys[:, i] * unit_keys[:, j]).sum(-1).mean() > threshold)
        clusters.setdefault(next(similar, j), []).append(j)
    return clusters


def reference(
    key_cache: Tensor,
    value_cache: Tensor,
    slot_bias: Tensor,
    length: Tensor,
    chunk_id: Tensor,
    thresholds: Tensor,
    target: Tensor,
    span: int = 64,
) -> tuple[Tensor, ...]:
    """The contract, one slot at a time; float64 caches are computed in float64."""
    import torch

    inputs = (key_cache, value_cache, slot_bias, length, chunk_id, thresholds, target)
    dim = sizes([(spec.shape, t.shape) for spec, t in zip(OP.inputs, inputs, strict=True)])
    heads, groups, capacity, levels = dim["H"], dim["G"], dim["C"], dim["L"]
    if groups not in (1, heads):
        raise SemkvError("chunk_id has the wrong number of groups", where=OP.name, expected=f"1 or {heads}", got=groups)
    if span < 1 or capacity % span:
        raise SemkvError(
            "the capacity is not a multiple of span", where=OP.name, expected=f"a multiple of {span}", got=capacity
        )
    per_group = heads // groups
    accumulate = torch.float64 if key_cache.dtype == torch.float64 else torch.float32
    keys, values, bias = key_cache.clone(), value_cache.clone(), slot_bias.clone()
    new_length, level = length.clone(), torch.full_like(length, -1)
    source = torch.full_like(chunk_id[:, :, 0], -1)
    for b, used in enumerate(length.tolist()):
        if used <= max(int(target[b]), 0):
            source[b, :, :used] = torch.arange(used, device=length.device)
            continue
        unit = key_cache[b].to(accumulate)
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        group_bias = slot_bias[b, :groups].to(accumulate)
        live = (torch.arange(capacity, device=length.device) < used) & (group_bias > -math.inf)
        for attempt in range(levels):
            clusters = [
                greedy_clusters(
                    unit[g * per_group : (g + 1) * per_group],
                    live[g],
                    chunk_id[b, g, attempt],
                    float(thresholds[attempt]),
                    span,
                )
                for g in range(groups)
            ]
            level[b], new_length[b] = attempt, max(len(group) for group in clusters)
            if new_length[b] <= target[b]:
                break
        keys[b], values[b], bias[b] = 0, 0, 0
        bias[b, :, : int(new_length[b])] = -math.inf
        for g, group in enumerate(clusters):
            for new, (seed, members) in enumerate(group.items()):
                source[b, g, new] = seed
                weight = torch.exp(group_bias[g, members])
                for h in range(g * per_group, (g + 1) * per_group):
                    if len(members) == 1:
                        keys[b, h, new], values[b, h, new] = key_cache[b, h, seed], value_cache[b, h, seed]
                        bias[b, h, new] = slot_bias[b, g, seed]
                        continue
                    for out, old in ((keys, key_cache), (values, value_cache)):
                        rows = old[b, h, members].to(accumulate)
                        out[b, h, new] = ((weight[:, None] * rows).sum(0) / weight.sum()).to(out.dtype)
                    bias[b, h, new] = torch.log(weight.sum())
    return keys, values, bias, new_length, source, level


def fake(
    key_cache: Tensor, value_cache: Tensor, slot_bias: Tensor, length: Tensor, chunk_id: Tensor, *_: object
) -> tuple[Tensor, ...]:
    """Shapes and types only, for `torch.export`."""
    import torch

    same = [torch.empty_like(tensor) for tensor in (key_cache, value_cache, slot_bias, length)]
    return *same, torch.empty_like(chunk_id[:, :, 0]), torch.empty_like(length)


@functools.cache
def register_torch() -> None:
    """Register `torch.ops.semkv.semantic_cluster`; further calls do nothing."""
    register_torch_op(OP, reference, fake)


# How the body works (two related nodes share a line).
#
# Seeds are the first maximal independent set, in slot order, of the graph "i can absorb j": the one fixed point of "a
# slot is a seed when no seed can absorb it". Applying that rule to all slots at once reaches it from any start, in as
# many rounds as the longest chain of slots that depend on each other. From the start "all are seeds", every second
# state contains the answer and the others lie inside it, so two successive states of equal size are equal.
#
# Joiners are taken in blocks of span / 2 slots (span, when odd), each compared with the window of slots before it that
# it can reach, itself included: [blocks, window, block]. The graph is stored as float32, so that a round is one matrix
# product. Where on tensors of that size is slower in ONNX Runtime than everything else here together, so the band is
# masked through the threshold, and chunks through unequal ids.
#
# Weights are relative to the seed's: exactly 1 for a cluster of one, so that its key, value and bias come out bit for
# bit; and sums start at -0.0, the neutral element that keeps the sign of zeros. Where a slot is dropped the last new
# slot is dead, so whatever is dropped goes there, with weight 0. GatherElements would be a little faster than Gather,
# but onnx.reference (1.23) cannot gather from more than 64 elements with it.
_BODY = """
  zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()  none = Constant <value_int = -1> ()
  slot_axes = Constant <value_ints = [1, 2]> ()
  batch = Shape <start = 0, end = 1> (key_cache)  capacity = Shape <start = 2, end = 3> (key_cache)
  groups = Shape <start = 1, end = 2> (chunk_id)  group_shape = Concat <axis = 0> (batch, groups, capacity)
  capacity_scalar = Squeeze (capacity)  slot = Range (zero, capacity_scalar, one)
  length_column = Unsqueeze (length, slot_axes)  is_used = Less (slot, length_column)
  used_slot = Where (is_used, slot, none)
  most_kept = Max (target, zero)  is_over = Greater (length, most_kept)
  is_over_number = Cast <to = 7> (is_over)  over_count = ReduceSum <keepdims = 0> (is_over_number)
  any_over = Cast <to = 9> (over_count)
  key_cache_out, value_cache_out, slot_bias_out, length_out, source_slot, level = If (any_over) <
    else_branch: graph = nothing_to_do () => (same_key, same_value, same_bias, same_length, same_source, same_level) {
      same_key = Identity (key_cache)  same_value = Identity (value_cache)
      same_bias = Identity (slot_bias)  same_length = Identity (length)
      same_source = Expand (used_slot, group_shape)  same_level = Expand (none, batch)
    },
    then_branch: graph = cluster () => (new_key, new_value, new_bias, new_length, new_source, new_level) {
      BLOCKS SIMILARITY LEVELS PLACES MERGE
    }
  >
"""

# Index arithmetic: which slots make up each block and its window, and which pairs lie within span of each other.
BLOCKS = """
      rest = Constant <value_ints = [-1]> ()  keep = Constant <value_ints = [0]> ()
      single = Constant <value_ints = [1]> ()  two = Constant <value_int = 2> ()
      last_axis = Constant <value_ints = [-1]> ()  zero_f = Constant <value_float = 0.0> ()
      infinity = Constant <value_float = inf> ()  minus_infinity = Constant <value_float = -inf> ()

      span_scalar = Constant <value_int: int = @span> ()
      span_odd = Mod (span_scalar, two)  parts = Sub (two, span_odd)
      block_size_scalar = Div (span_scalar, parts)  window_scalar = Add (span_scalar, block_size_scalar)
      block_size = Reshape (block_size_scalar, single)  window = Reshape (window_scalar, single)
      candidate = Range (zero, window_scalar, one)  candidate_column = Unsqueeze (candidate, single)
      joiner = Range (zero, block_size_scalar, one)  joiner_here = Add (joiner, span_scalar)
      is_near = Greater (candidate_column, joiner)  is_earlier = Less (candidate_column, joiner_here)
      in_band = And (is_near, is_earlier)  band_offset = Where (in_band, zero_f, infinity)
      candidate_left = Sub (window_scalar, candidate_column)  earliness = Cast <to = 1> (candidate_left)
      joiner_left = Sub (block_size_scalar, joiner)  own_earliness = Cast <to = 1> (joiner_left)

      block_shape = Concat <axis = 0> (keep, keep, rest, single, block_size)
      candidate_row_shape = Concat <axis = 0> (keep, keep, keep, single, window)
      candidate_shape = Concat <axis = 0> (keep, keep, keep, window, single)
      block_start_flat = Range (zero, capacity_scalar, block_size_scalar)
      block_start_axes = Constant <value_ints = [1, 2]> ()
      block_start = Unsqueeze (block_start_flat, block_start_axes)  block_end = Add (block_start, block_size_scalar)
      block_start_column = Unsqueeze (block_start_flat, single)
      block_column = Div (block_start_column, block_size_scalar)  parts_and_own = Add (parts, one)
      part_number = Range (zero, parts_and_own, one)  part_offset = Sub (part_number, parts)
      part_wanted = Add (block_column, part_offset)  part = Max (part_wanted, zero)
      part_exists_flat = GreaterOrEqual (part_wanted, zero)
      largest_chunk = Constant <value_int = 9223372036854775807> ()  no_chunk = Constant <value_int = -2> ()
      part_chunk_limit_flat = Where (part_exists_flat, largest_chunk, no_chunk)
      part_axes = Constant <value_ints = [2, 3]> ()
      part_chunk_limit = Unsqueeze (part_chunk_limit_flat, part_axes)
"""

# Cosines, summed over the heads of a group (the thresholds are scaled instead of the sum).
SIMILARITY = """
      heads = Shape <start = 1, end = 2> (key_cache)  head_size = Shape <start = 3, end = 4> (key_cache)
      heads_per_group = Div (heads, groups)  key_f = Cast <to = 1> (key_cache)
      key_squared = Mul (key_f, key_f)  norm_squared = ReduceSum <keepdims = 0> (key_squared, last_axis)
      norm_floor = Constant <value_float = 1e-12> ()
      norm = Sqrt (norm_squared)  norm_floored = Max (norm, norm_floor)
      norm_inverse_flat = Reciprocal (norm_floored)  norm_inverse = Unsqueeze (norm_inverse_flat, last_axis)
      unit_key = Mul (key_f, norm_inverse)
      split_shape = Concat <axis = 0> (keep, groups, heads_per_group, capacity, head_size)
      unit_split = Reshape (unit_key, split_shape)  unit_by_slot = Transpose <perm = [0, 1, 3, 2, 4]> (unit_split)
      feature_count = Mul (heads_per_group, head_size)
      joiner_key_shape = Concat <axis = 0> (keep, keep, rest, block_size, feature_count)
      joiner_key = Reshape (unit_by_slot, joiner_key_shape)
      candidate_key_parts = Gather <axis = 2> (joiner_key, part)
      candidate_key_shape = Concat <axis = 0> (keep, keep, keep, window, feature_count)
      candidate_key = Reshape (candidate_key_parts, candidate_key_shape)
      joiner_key_t = Transpose <perm = [0, 1, 2, 4, 3]> (joiner_key)
      similarity = MatMul (candidate_key, joiner_key_t)  heads_per_group_f = Cast <to = 1> (heads_per_group)
      threshold_limit = Constant <value_float = 1.0> ()
      can_join = Less (thresholds, threshold_limit)  thresholds_used = Where (can_join, thresholds, infinity)
      head_thresholds = Mul (thresholds_used, heads_per_group_f)
"""

# One pass per level until every row fits: owner is the seed of each slot, per row that of the level it settled on.
_LEVELS = """
      group_bias = Slice (slot_bias, keep, groups, single)  is_finite = Greater (group_bias, minus_infinity)
      is_live = And (is_used, is_finite)  row_over = Unsqueeze (is_over, slot_axes)
      settled_first = Not (is_over)  owner_first = Expand (slot, group_shape)
      level_first = Expand (none, batch)  level_count = Shape <start = 2, end = 3> (chunk_id)
      level_limit = Squeeze (level_count)
      settled, owner, new_level, count = Loop (level_limit, any_over, settled_first, owner_first, level_first, length) <
        body: graph = try_level (
          int64 attempt, bool attempt_on, bool[] settled_before, int64[] owner_before, int64[] level_before,
          int64[] count_before
        ) => (try_next, settled_after, owner_after, level_after, count_after) {
          chunk = Gather <axis = 2> (chunk_id, attempt)  known_chunk = Max (chunk, none)
          has_chunk = GreaterOrEqual (chunk, zero)  may_seed_flat = And (is_live, has_chunk)
          may_seed = Reshape (may_seed_flat, block_shape)  joiner_chunk = Reshape (known_chunk, block_shape)
          candidate_chunk_parts = Gather <axis = 2> (joiner_chunk, part)
          candidate_chunk_real = Min (candidate_chunk_parts, part_chunk_limit)
          candidate_chunk = Reshape (candidate_chunk_real, candidate_shape)
          threshold = Gather <axis = 0> (head_thresholds, attempt)  limit = Add (band_offset, threshold)
          is_similar = Greater (similarity, limit)  is_same_chunk = Equal (candidate_chunk, joiner_chunk)
          is_absorbed = And (is_similar, is_same_chunk)  absorbs = Cast <to = 1> (is_absorbed)

          seeds_first = Cast <to = 1> (may_seed)
          seeds = Loop (capacity_scalar, any_over, seeds_first) <
            body: graph = two_rounds (int64 round, bool round_on, float[] even) => (is_changing, odd_to_even) {
              even_parts = Gather <axis = 2> (even, part)  even_row = Reshape (even_parts, candidate_row_shape)
              even_hits = MatMul (even_row, absorbs)  even_free = Equal (even_hits, zero_f)
              is_odd_seed = And (even_free, may_seed)  odd = Cast <to = 1> (is_odd_seed)
              odd_parts = Gather <axis = 2> (odd, part)  odd_row = Reshape (odd_parts, candidate_row_shape)
              odd_hits = MatMul (odd_row, absorbs)  odd_free = Equal (odd_hits, zero_f)
              is_next_seed = And (odd_free, may_seed)  odd_to_even = Cast <to = 1> (is_next_seed)
              odd_count = ReduceSum <keepdims = 0> (odd)  next_count = ReduceSum <keepdims = 0> (odd_to_even)
              is_changing = Greater (next_count, odd_count)
            }
          >
          seed_parts = Gather <axis = 2> (seeds, part)  seed_column = Reshape (seed_parts, candidate_shape)
          seed_earliness = Mul (seed_column, earliness)  absorber_earliness = Mul (absorbs, seed_earliness)
          candidate_axis = Constant <value_ints = [-2]> ()
          best_absorber = ReduceMax <keepdims = 1> (absorber_earliness, candidate_axis)
          best_owner = Max (best_absorber, own_earliness)  owner_left = Cast <to = 7> (best_owner)
          owner_block = Sub (block_end, owner_left)  owner_found = Reshape (owner_block, group_shape)

          is_own_found = Equal (owner_found, slot)  is_seed_found = And (is_live, is_own_found)
          is_seed_found_number = Cast <to = 7> (is_seed_found)
          group_count = ReduceSum <keepdims = 0> (is_seed_found_number, last_axis)
          count_found = ReduceMax <keepdims = 0> (group_count, last_axis)
          row_settled = Unsqueeze (settled_before, slot_axes)
          owner_after = Where (row_settled, owner_before, owner_found)
          level_after = Where (settled_before, level_before, attempt)
          count_after = Where (settled_before, count_before, count_found)  fits = LessOrEqual (count_found, target)
          settled_after = Or (settled_before, fits)  unsettled = Not (settled_after)
          unsettled_number = Cast <to = 7> (unsettled)  unsettled_count = ReduceSum <keepdims = 0> (unsettled_number)
          try_next = Cast <to = 9> (unsettled_count)
        }
      >
      new_length = Identity (count)
"""

# Where each slot goes, with what share of its cluster, and what does not depend on the head: sources and biases.
PLACES = """
      slot_axis = Constant <value_int = -1> ()
      slot_total = Size (owner)  group_start_flat = Range (zero, slot_total, capacity_scalar)
      group_start_shape = Concat <axis = 0> (batch, groups, single)
      group_start = Reshape (group_start_flat, group_start_shape)  owner_flat = Add (owner, group_start)
      row_same = Not (row_over)  is_kept = Or (is_live, row_same)
      is_own = Equal (owner, slot)  is_seed = And (is_kept, is_own)
      is_seed_number = Cast <to = 7> (is_seed)  seeds_so_far = CumSum (is_seed_number, slot_axis)
      seed_place = Sub (seeds_so_far, one)  seed_place_flat = Reshape (seed_place, rest)
      owner_place = Gather (seed_place_flat, owner_flat)  last_slot = Sub (capacity_scalar, one)
      place = Where (is_kept, owner_place, last_slot)  owner_kept = Where (is_kept, owner, none)
      no_source = Expand (none, group_shape)  source = ScatterElements <axis = -1> (no_source, place, owner_kept)
      new_source = Where (row_over, source, used_slot)

      live_bias = Where (is_live, group_bias, zero_f)  live_bias_flat = Reshape (live_bias, rest)
      owner_bias = Gather (live_bias_flat, owner_flat)  relative_bias = Sub (live_bias, owner_bias)
      relative_weight = Exp (relative_bias)  weight = Where (is_kept, relative_weight, zero_f)
      no_weight = Expand (zero_f, group_shape)
      TOTAL
      seed_weight = Constant <value_float = 1.0> ()
      total = Max (total_or_none, seed_weight)  total_flat = Reshape (total, rest)
      owner_total = Gather (total_flat, owner_flat)

      owner_log_total = Log (owner_total)  core_bias = Add (owner_bias, owner_log_total)
      source_bias = ScatterElements <axis = -1> (no_weight, place, core_bias)
      new_length_column = Unsqueeze (new_length, slot_axes)  below_length = Less (slot, new_length_column)
      empty_bias = Where (below_length, minus_infinity, zero_f)  has_source = GreaterOrEqual (source, zero)
      group_bias_new = Where (has_source, source_bias, empty_bias)
      new_bias = Where (row_over, group_bias_new, slot_bias)
"""

# The weights of each cluster's members, summed at its seed.
_TOTAL = """
      total_or_none = ScatterElements <axis = -1, reduction = "add"> (no_weight, owner, weight)
"""

# Both caches: one weighted sum of rows each.
_MERGE = """
      cache_shape = Shape (key_cache)  row_total = Size (slot_bias)
      head_start_flat = Range (zero, row_total, capacity_scalar)
      head_start_shape = Concat <axis = 0> (batch, heads, single)
      head_start = Reshape (head_start_flat, head_start_shape)  place_in_rows = Add (head_start, place)
      place_shape = Concat <axis = 0> (rest, single)  place_rows = Reshape (place_in_rows, place_shape)
      share = Div (weight, owner_total)  share_column = Unsqueeze (share, last_axis)

      key_shares = Mul (key_f, share_column)  key_rows = Flatten <axis = 3> (key_shares)
      empty_shape = Shape (key_rows)  empty = ConstantOfShape <value = float[1] {-0.0}> (empty_shape)
      key_merged = ScatterND <reduction = "add"> (empty, place_rows, key_rows)
      key_cache_f = Reshape (key_merged, cache_shape)  new_key = CastLike (key_cache_f, key_cache)

      value_f = Cast <to = 1> (value_cache)  value_shares = Mul (value_f, share_column)
      value_rows = Flatten <axis = 3> (value_shares)
      value_merged = ScatterND <reduction = "add"> (empty, place_rows, value_rows)
      value_cache_f = Reshape (value_merged, cache_shape)  new_value = CastLike (value_cache_f, value_cache)
"""


def function_proto() -> onnx.FunctionProto:
    """The operator's body in standard operators; every shape follows from the input shapes."""
    parts = BLOCKS + SIMILARITY + _LEVELS + PLACES.replace("TOTAL", _TOTAL) + _MERGE
    return parse_function(OP, _BODY.replace("BLOCKS SIMILARITY LEVELS PLACES MERGE", parts))

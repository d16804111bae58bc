"""SemanticBlockSelect: choose the semantic blocks a query attends to, as a list of slots of constant width.

Inputs (B batch, Hq query heads, Hkv key/value heads, S rows, D head size, N blocks, R vectors a block, L slots a block;
T float32, float16, bfloat16):
    query            [B,Hq,S,D]     T      rotary embedding applied; S is 1 when decoding
    representatives  [B,Hkv,N,R,D]  T      of SemanticBlockMap: R = 2 smallest and largest keys, R = 1 mean key
    block_slots      [B,N,L]        int64  each block's slots, then -1; they ascend from one block to the next
    block_count      [B]            int64  blocks in use: 0 .. block_count-1, at most N
    pinned           [B,N]          int64  not 0: the block is taken before all others, whatever its score
Output:
    slot_index       [B,Hkv,width]  int64  slots to attend to, ascending, then -1
Attributes:
    width       int, 1024: slots chosen at most, per KV head.
    reduce_max  int, 0: a block's score is the sum over the query heads of the group and their rows; 1: the largest.

Per batch row and KV head:
* Score of block b for one query row q, float32, finite (Quest, arXiv 2406.10774, algorithm 1):
    R = 2: sum_d max(q_d smallest_d, q_d largest_d), which no q . k of the block exceeds;  R = 1: q . mean.
  Query heads h Hq/Hkv .. (h+1) Hq/Hkv - 1 belong to KV head h.
* Candidates are the blocks in use with at least one slot. Pinned ones come first: block 0, then from the highest number
  down, so that too small a width costs the oldest of the recent ones; then the others from the highest score down; of
  equal scores the lowest number comes first.
* They are taken whole in that order while they fit in what is left of width. The first that does not fit gives its
  first slots, as many as there is room for, and ends the choice: no later block is taken, however short.
* The slots taken are written in ascending order; -1 follows. A slot is never written twice.

The block that is still open is pinned, and its row of block_slots must be current: what NexusAttention appends in a
step it attends to by itself, and before the next selection whoever keeps the table writes those slots behind the open
block's others (a scatter of S entries, or SemanticBlockMap with N = 1, which renews the representatives too). With
width at least twice L, block 0 and the open block are always whole.

What lies in representatives and block_slots from block_count on changes nothing, nor do a pinned block's
representatives.

Errors (reference only; the ONNX body does not check): SemkvError when shapes disagree, Hq is not a multiple of Hkv, R
is neither 1 nor 2, block_count lies outside 0..N, or the slots in use do not ascend (overlapping blocks would count
twice in a softmax).

Source: the KV selection of DynSplit-KV (arXiv 2602.03184), whose scoring, group reduction and budget we could not read.
Ours: scores of Quest; their sum over the group (or the maximum); selection per KV head; a budget in slots instead of a
number of blocks, so that short blocks waste no room: with width = k L at least k blocks are taken, where that many are
in use; pinned blocks (sinks, recent window, and always the open block, whose representatives are stale) first, so that
only a width smaller than all pinned ones together cuts them; their order; ties to the lower number; the cut.
Scores carry no 1/sqrt(D): it would change no order. Rows that NexusAttention appends in the same step are in no block.
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
    name="SemanticBlockSelect",
    inputs=tensors(
        "query B,Hq,S,D T",
        "representatives B,Hkv,N,R,D T",
        "block_slots B,N,L int64",
        "block_count B int64",
        "pinned B,N int64",
    ),
    outputs=tensors("slot_index B,Hkv,width int64"),
    attributes={"width": 1024, "reduce_max": 0},
)


def block_scores(rows: Tensor, representatives: Tensor, reduce_max: int = 0) -> Tensor:
    """Scores [N] of blocks with representatives [N,R,D] for query rows [P,D]."""
    products = rows[:, None, None] * representatives
    by_row = products.amax(2).sum(-1)
    return by_row.amax(0) if reduce_max else by_row.sum(0)


def _check(dim: dict[str, int], block_slots: Tensor, block_count: Tensor, width: int) -> None:
    if dim["Hq"] % dim["Hkv"]:
        raise SemkvError(
            "query heads must be a multiple of KV heads", where=OP.name, expected=dim["Hkv"], got=dim["Hq"]
        )
    if dim["R"] not in (1, 2):
        raise SemkvError("wrong number of vectors a block", where=OP.name, expected="1 or 2", got=dim["R"])
    if width < 1:
        raise SemkvError("width out of range", where=OP.name, expected="1 or more", got=width)
    if bool(((block_count < 0) | (block_count > dim["N"])).any()):
        raise SemkvError(
            "block_count out of range", where=OP.name, expected=f"0 to {dim['N']}", got=block_count.tolist()
        )
    for b, count in enumerate(block_count.tolist()):
        table = block_slots[b, :count]
        is_slot = table >= 0
        slots = table[is_slot]
        if bool((is_slot[:, 1:] & ~is_slot[:, :-1]).any()) or bool((slots[1:] <= slots[:-1]).any()):
            raise SemkvError(
                f"the block slots of batch row {b} do not ascend",
                where=OP.name,
                expected="disjoint blocks in the order of their slots, each padded with -1 at its end",
                got=table.tolist(),
            )


def reference(
    query: Tensor,
    representatives: Tensor,
    block_slots: Tensor,
    block_count: Tensor,
    pinned: Tensor,
    width: int = 1024,
    reduce_max: int = 0,
) -> tuple[Tensor]:
    """The contract, one batch row and KV head at a time; float64 queries are scored in float64."""
    import torch

    inputs = (query, representatives, block_slots, block_count, pinned)
    dim = sizes([(spec.shape, t.shape) for spec, t in zip(OP.inputs, inputs, strict=True)])
    _check(dim, block_slots, block_count, width)
    group = dim["Hq"] // dim["Hkv"]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    slot_index = block_slots.new_full((dim["B"], dim["Hkv"], width), -1)
    for b, count in enumerate(block_count.tolist()):
        slots = [[slot for slot in block if slot >= 0] for block in block_slots[b, :count].tolist()]
        first = [bool(p) for p in pinned[b].tolist()]
        for h in range(dim["Hkv"]):
            rows = query[b, h * group : (h + 1) * group].reshape(-1, dim["D"]).to(accumulate)
            score = block_scores(rows, representatives[b, h, :count].to(accumulate), reduce_max).tolist()
            ranked = sorted(
                (n for n in range(count) if slots[n]),
                key=lambda n: (0, 0.0, -n if n else -count) if first[n] else (1, -score[n], n),
            )
            chosen: list[int] = []
            for n in ranked:
                chosen += slots[n][: width - len(chosen)]
            slot_index[b, h, : len(chosen)] = torch.tensor(sorted(chosen), dtype=torch.int64)
    return (slot_index,)


def fake(
    query: Tensor,
    representatives: Tensor,
    block_slots: Tensor,
    block_count: Tensor,
    pinned: Tensor,
    width: int = 1024,
    reduce_max: int = 0,
) -> tuple[Tensor]:
    """Shapes and types only, for `torch.export`."""
    return (block_slots.new_empty((query.shape[0], representatives.shape[1], width)),)


@functools.cache
def register_torch() -> None:
    """Register `torch.ops.semkv.semantic_block_select`; further calls do nothing."""
    register_torch_op(OP, reference, fake)


# max(q s, q l) is q l where q > 0 and q s elsewhere, so with q split in its negative and positive part the bound is one
# matrix product over the block's R vectors, as the mean's score is; q, its negative and its positive part are rows 0, 1
# and 2 of one tensor, of which R chooses row 0 or rows 1 and 2. TopK puts the lower of two equal elements first, by its
# definition; where pinned blocks, which it only has to put before the others, come among themselves follows from sums
# over their numbers. Queries are summed before they are multiplied, unless the largest counts: sums and rows are one
# tensor, of which reduce_max chooses. A place in the list belongs to the block that began last there: a mark where each
# begins, and a running sum; so that what is scattered is blocks, which are few, and not their slots. What is not taken
# gets places of its own behind the last one, which are cut off: TensorRT refuses a scatter of more elements than there
# are places.
_BODY = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  none = Constant <value_int = -1> ()
  zero_f = Constant <value_float = 0.0> ()
  infinity = Constant <value_float = inf> ()
  minus_infinity = Constant <value_float = -inf> ()
  keep = Constant <value_ints = [0]> ()
  single = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
  three = Constant <value_ints = [3]> ()
  batch = Shape <start = 0, end = 1> (query)
  kv_heads = Shape <start = 1, end = 2> (representatives)
  blocks = Shape <start = 2, end = 3> (representatives)
  vectors = Shape <start = 3, end = 4> (representatives)
  head_size = Shape <start = 3, end = 4> (query)
  longest = Shape <start = 2, end = 3> (block_slots)
  blocks_scalar = Squeeze (blocks)
  longest_scalar = Squeeze (longest)

  query_f = Cast <to = 1> (query)
  rows_shape = Concat <axis = 0> (batch, kv_heads, rest, single, head_size)
  query_rows = Reshape (query_f, rows_shape)
  query_negative = Min (query_rows, zero_f)
  query_positive = Max (query_rows, zero_f)
  query_parts = Concat <axis = 3> (query_rows, query_negative, query_positive)
  first = Sub (vectors, one)
  end = Add (first, vectors)
  query_chosen = Slice (query_parts, first, end, three)
  two = Constant <value_ints = [2]> ()
  query_sum = ReduceSum <keepdims = 1> (query_chosen, two)
  query_sum_and_rows = Concat <axis = 2> (query_sum, query_chosen)
  reduce_max_given = Constant <value_int: int = @reduce_max> ()
  reduce_max_on = Min (reduce_max_given, one)
  scored_first = Reshape (reduce_max_on, single)
  many = Constant <value_ints = [1073741824]> ()
  scored_more = Mul (scored_first, many)
  scored_end = Add (scored_more, single)
  query_scored = Slice (query_sum_and_rows, scored_first, scored_end, two)
  flat_shape = Constant <value_ints = [0, 0, 0, -1]> ()
  query_flat = Reshape (query_scored, flat_shape)
  representatives_f = Cast <to = 1> (representatives)
  block_flat = Reshape (representatives_f, flat_shape)
  block_columns = Transpose <perm = [0, 1, 3, 2]> (block_flat)
  products = MatMul (query_flat, block_columns)
  score = ReduceMax <keepdims = 0> (products, two)

  is_slot = GreaterOrEqual (block_slots, zero)
  is_slot_number = Cast <to = 7> (is_slot)
  table_length = ReduceSum <keepdims = 0> (is_slot_number, rest)
  block = Range (zero, blocks_scalar, one)
  count_column = Unsqueeze (block_count, single)
  in_use = Less (block, count_column)
  length = Where (in_use, table_length, zero)
  is_candidate_row = Greater (length, zero)
  is_candidate = Unsqueeze (is_candidate_row, single)
  not_pinned_row = Equal (pinned, zero)
  not_pinned = Unsqueeze (not_pinned_row, single)
  score_or_first = Where (not_pinned, score, infinity)
  rank_by = Where (is_candidate, score_or_first, minus_infinity)
  ranked_score, order = TopK <axis = -1, largest = 1, sorted = 1> (rank_by, blocks)

  length_total = Mul (batch, blocks)
  length_total_scalar = Squeeze (length_total)
  row_start_flat = Range (zero, length_total_scalar, blocks_scalar)
  row_start_axes = Constant <value_ints = [1, 2]> ()
  row_start = Unsqueeze (row_start_flat, row_start_axes)
  order_in_rows = Add (order, row_start)
  length_flat = Reshape (length, rest)
  ranked_length = Gather <axis = 0> (length_flat, order_in_rows)
  ranked_end = CumSum (ranked_length, none)
  ranked_start = Sub (ranked_end, ranked_length)
  width_given = Constant <value_int: int = @width> ()
  room_left = Sub (width_given, ranked_start)
  room = Max (room_left, zero)
  ranked_taken = Min (ranked_length, room)
  order_shape = Shape (order)
  nothing = Expand (zero, order_shape)
  taken_by_score = ScatterElements <axis = -1> (nothing, order, ranked_taken)

  pinned_length = Where (not_pinned_row, zero, length)
  pinned_end = CumSum (pinned_length, none)
  pinned_total = ReduceSum <keepdims = 1> (pinned_length, rest)
  first_length = Slice (pinned_length, keep, single, single)
  pinned_later = Sub (pinned_total, pinned_end)
  pinned_start_others = Add (pinned_later, first_length)
  is_first = Equal (block, zero)
  pinned_start = Where (is_first, zero, pinned_start_others)
  pinned_room_left = Sub (width_given, pinned_start)
  pinned_room = Max (pinned_room_left, zero)
  pinned_taken_row = Min (pinned_length, pinned_room)
  pinned_taken = Unsqueeze (pinned_taken_row, single)
  taken = Where (not_pinned, taken_by_score, pinned_taken)

  taken_end = CumSum (taken, none)
  taken_start = Sub (taken_end, taken)
  is_taken = Greater (taken, zero)
  row_shape = Shape <start = 0, end = 2> (taken)
  taken_shape = Shape (taken)
  width = Reshape (width_given, single)

  behind_width = Add (width_given, blocks_scalar)
  place_behind = Range (width_given, behind_width, one)
  place = Where (is_taken, taken_start, place_behind)
  mark = Expand (one, taken_shape)
  mark_count = Add (width, blocks)
  mark_shape = Concat <axis = 0> (row_shape, mark_count)
  no_mark = Expand (zero, mark_shape)
  marked = ScatterElements <axis = -1> (no_mark, place, mark)
  marks = Slice (marked, keep, width, rest)
  begun = CumSum (marks, none)
  last_begun = Sub (begun, one)
  ordinal = Max (last_begun, zero)

  taken_number = Cast <to = 7> (is_taken)
  taken_so_far = CumSum (taken_number, none)
  taken_ordinal = Sub (taken_so_far, one)
  twice = Add (blocks, blocks)
  twice_scalar = Squeeze (twice)
  ordinal_behind = Range (blocks_scalar, twice_scalar, one)
  list_place = Where (is_taken, taken_ordinal, ordinal_behind)
  list_shape = Concat <axis = 0> (row_shape, twice)
  no_block = Expand (zero, list_shape)
  block_number = Expand (block, taken_shape)
  block_list = ScatterElements <axis = -1> (no_block, list_place, block_number)

  ordinal_column = Unsqueeze (ordinal, rest)
  block_at = GatherND <batch_dims = 2> (block_list, ordinal_column)
  block_at_column = Unsqueeze (block_at, rest)
  start_at = GatherND <batch_dims = 2> (taken_start, block_at_column)
  step = Range (zero, width_given, one)
  step_inside = Sub (step, start_at)
  last_step = Sub (longest_scalar, one)
  step_clipped = Min (step_inside, last_step)
  table_start = Mul (block_at, longest)
  table_place = Add (table_start, step_clipped)
  rows_flat = Constant <value_ints = [0, -1]> ()
  rows_column = Constant <value_ints = [0, -1, 1]> ()
  table_place_column = Reshape (table_place, rows_column)
  table_flat = Reshape (block_slots, rows_flat)
  slot_flat = GatherND <batch_dims = 1> (table_flat, table_place_column)
  place_shape = Shape (table_place)
  slot = Reshape (slot_flat, place_shape)
  taken_total = ReduceSum <keepdims = 1> (taken, rest)
  is_used = Less (step, taken_total)
  slot_index = Where (is_used, slot, none)
"""


def function_proto() -> onnx.FunctionProto:
    """The operator's body in standard operators: one matrix product, one TopK over the blocks, scatters of blocks."""
    return parse_function(OP, _BODY)

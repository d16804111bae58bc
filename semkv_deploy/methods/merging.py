"""What is dropped lives on in the slot most like it: values are averaged by importance, keys stay as they are.

A dropped slot is merged into the slot of its head that stays and whose key (as cached, rotated) has the largest cosine
to its own, where that is above `LEAST_COSINE`. Of a slot that stays, with weight `w_k`, and of those merged into it:

    value = (w_k v_k + sum w_d v_d) / (w_k + sum w_d)        bias += log((w_k + sum w_d) / w_k)

A weight is the attention by which slots were chosen, and no `w_d` counts more than its `w_k`: what stays for its place
alone, in the window, would otherwise be taken for what it is not. So a slot then gets about the attention that all of
them had, and gives the mean of what they gave. It is what clusters of SemantiCache do (proportional attention), with
seeds that importance chooses, and it needs no reference queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

LEAST_COSINE = 0.5
"""Between keys. Below it two keys are looked at by different queries, and one cannot stand for the other."""

TINY = 1e-12

FUNCTION, FUNCTION_DOMAIN = "MergeDropped", "semkv.methods"
"""A function of compressors' own graphs, so that a target may put another body in its place."""

INPUTS = (
    "key_cache", "value_cache", "key_kept", "value_kept", "bias_kept", "length", "length_kept",
    "keep_index", "is_kept", "score", "scored", "frozen",
)  # fmt: skip
"""Caches before (`key_cache`, `value_cache` `[B,H,C,D]`, `length` `[B]`) and after slots were chosen (`*_kept`),
`keep_index` `[B,H,C]` as `CompactCache` takes it, bool `is_kept` `[B,H,C]` which slots these are, `score` `[B,H,C]` the
log of each slot's weight, `scored`: 0 merges nothing, and `frozen`: nothing is merged into the first so many slots."""

OUTPUTS = ("value_merged", "bias_merged")


def merged(below_sinks_frozen: bool) -> str:
    """ONNX text after `KEEP_HIGHEST` and `CompactCache`, from `score`, the log of weights.

    Args:
        below_sinks_frozen: nothing is merged into the slots below `sinks`.
    """
    return f"""
    value_cache_out, slot_bias_out = {FUNCTION_DOMAIN}.{FUNCTION} (
        key_cache, value_cache, key_cache_out, value_chosen, bias_chosen, length, length_out, keep_index, is_kept,
        score, scored, {"sinks" if below_sinks_frozen else "zero"})
    """


UNITS = """
    key_f = Cast <to = 1> (key_cache)
    squares = Mul (key_f, key_f)
    square = ReduceSum <keepdims = 1> (squares, channel_axis)
    square_bounded = Max (square, tiny)
    norm = Sqrt (square_bounded)
    unit = Div (key_f, norm)
"""
"""`unit` `[B,H,C,D]`, keys of length 1."""

CONSTANTS = f"""
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    none = Constant <value_int = -1> ()
    zero_f = Constant <value_float = 0.0> ()
    tiny = Constant <value_float = {TINY:.15f}> ()
    no_cosine = Constant <value_float = -2.0> ()
    least_cosine = Constant <value_float = {LEAST_COSINE}> ()
    slot_axis = Constant <value_ints = [2]> ()
    channel_axis = Constant <value_ints = [3]> ()
    slot_axes = Constant <value_ints = [1, 2]> ()
    capacity_1 = Shape <start = 2, end = 3> (key_cache)
    capacity = Squeeze (capacity_1)
    slot = Range (zero, capacity, one)
    length_column = Unsqueeze (length, slot_axes)
    is_live = Less (slot, length_column)
    not_kept = Not (is_kept)
    is_dropped = And (not_kept, is_live)
    counts = Greater (scored, zero_f)
    weight = Exp (score)
"""

KEPT_ROWS = """
    head_dim_1 = Shape <start = 3, end = 4> (key_cache)
    one_row = Constant <value_ints = [1]> ()
    row_shape = Concat <axis = 0> (one_row, one_row, one_row, head_dim_1)
    kept_from = Max (keep_index, zero)
    kept_column = Unsqueeze (kept_from, channel_axis)
    kept_rows = Expand (kept_column, row_shape)
    weight_kept = GatherElements <axis = 2> (weight, kept_from)
"""
"""Where what stays lies (`kept_from` `[B,H,C]`, `kept_rows` `[B,H,C,D]`), and its weights."""

MEANS = """
    total_kept_column = Unsqueeze (total_kept, channel_axis)
    value_mean_f = Div (share_kept, total_kept_column)
    value_mean = CastLike (value_mean_f, value_cache)
    is_grown = Greater (total_kept, weight_kept)
    is_grown_column = Unsqueeze (is_grown, channel_axis)
    value_merged = Where (is_grown_column, value_mean, value_kept)
    grown = Div (total_kept, weight_kept)
    bias_more = Log (grown)
    bias_merged = Add (bias_kept, bias_more)
"""
"""The outputs, from weights and weighted values of what stays with what was merged into it."""

# What is dropped is listed first, so that as few cosines are taken as there are pairs.
_BODY = f"""
    {CONSTANTS}
    dropped_number = Cast <to = 7> (is_dropped)
    dropped_so_far = CumSum (dropped_number, none)
    place_dropped = Sub (dropped_so_far, one)
    last_slot = Sub (capacity, one)
    place = Where (is_dropped, place_dropped, last_slot)
    named = Where (is_dropped, slot, none)
    list_shape = Shape (keep_index)
    empty = Expand (none, list_shape)
    dropped_all = ScatterElements <axis = 2> (empty, place, named)
    flat = Constant <value_ints = [-1]> ()
    dropped_count = ReduceSum <keepdims = 0> (dropped_number, slot_axis)
    dropped_flat = Reshape (dropped_count, flat)
    dropped_most = ReduceMax <keepdims = 1> (dropped_flat)
    dropped_start = Sub (dropped_most, dropped_most)
    dropped_index = Slice (dropped_all, dropped_start, dropped_most, slot_axis)
    dropped_from = Max (dropped_index, zero)
    is_there = GreaterOrEqual (dropped_index, zero)

    {UNITS}
    {KEPT_ROWS}
    dropped_column = Unsqueeze (dropped_from, channel_axis)
    dropped_rows = Expand (dropped_column, row_shape)
    dropped_unit = GatherElements <axis = 2> (unit, dropped_rows)
    value_f = Cast <to = 1> (value_cache)
    dropped_value = GatherElements <axis = 2> (value_f, dropped_rows)
    kept_unit = GatherElements <axis = 2> (unit, kept_rows)
    kept_unit_columns = Transpose <perm = [0, 1, 3, 2]> (kept_unit)
    cosine_any = MatMul (dropped_unit, kept_unit_columns)
    kept_takes = GreaterOrEqual (keep_index, frozen)
    kept_takes_row = Unsqueeze (kept_takes, slot_axis)
    cosine = Where (kept_takes_row, cosine_any, no_cosine)
    nearest = ArgMax <axis = 3, keepdims = 0> (cosine)
    best = ReduceMax <keepdims = 0> (cosine, channel_axis)
    is_near = Greater (best, least_cosine)
    near_there = And (is_near, is_there)
    merges = And (near_there, counts)

    dropped_weight_any = GatherElements <axis = 2> (weight, dropped_from)
    nearest_weight = GatherElements <axis = 2> (weight_kept, nearest)
    dropped_weight_most = Min (dropped_weight_any, nearest_weight)
    dropped_weight = Where (merges, dropped_weight_most, zero_f)
    total_kept = ScatterElements <axis = 2, reduction = "add"> (weight_kept, nearest, dropped_weight)
    nearest_column = Unsqueeze (nearest, channel_axis)
    nearest_rows = Expand (nearest_column, row_shape)
    dropped_weight_column = Unsqueeze (dropped_weight, channel_axis)
    dropped_share = Mul (dropped_weight_column, dropped_value)
    value_kept_f = Cast <to = 1> (value_kept)
    weight_kept_column = Unsqueeze (weight_kept, channel_axis)
    kept_share = Mul (weight_kept_column, value_kept_f)
    share_kept = ScatterElements <axis = 2, reduction = "add"> (kept_share, nearest_rows, dropped_share)
    {MEANS}
"""


def function_proto() -> onnx.FunctionProto:
    """`value_merged` `[B,H,C,D]` and `bias_merged` `[B,H,C]` of what stays, in standard operators."""
    return parse_body(_BODY)


def parse_body(body: str) -> onnx.FunctionProto:
    """The function with a body of its inputs and outputs."""
    import onnx.parser

    from semkv_deploy.ops import OPSET

    return onnx.parser.parse_function(
        f'<domain: "{FUNCTION_DOMAIN}", opset_import: ["": {OPSET}]>\n'
        f"{FUNCTION} ({', '.join(INPUTS)}) => ({', '.join(OUTPUTS)}) {{ {body} }}"
    )


def merge_dropped(
    before: dict[str, Tensor], after: dict[str, Tensor], keep: Tensor, score: Tensor, frozen: int = 0
) -> None:
    """The reference: changes `slot_bias` and `value_cache` of `after` in place.

    Args:
        before: `key_cache`, `value_cache` `[B,H,C,D]` and `length` `[B]`, before slots were chosen.
        after: `key_cache`, `value_cache`, `slot_bias` `[B,H,C]` and `length` of those that stay.
        keep: `[B,H,C]`, the slots that stay, negative behind the last.
        score: `[B,H,C]`, the log of each slot's weight, before.
        frozen: nothing is merged into the first so many slots.
    """
    import torch

    batch, heads = score.shape[:2]
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        kept = [slot for slot in keep[b, h].tolist() if slot >= 0]
        unit = torch.nn.functional.normalize(before["key_cache"][b, h].float(), dim=-1)
        value, weight = before["value_cache"][b, h].float(), score[b, h].exp()
        total, share = weight[kept].clone(), weight[kept, None] * value[kept]
        for slot in sorted(set(range(int(before["length"][b]))) - set(kept)):
            cosine = unit[kept] @ unit[slot]
            # What stays of them is first, in the same order.
            cosine[:frozen] = -2
            nearest = int(cosine.argmax())
            if cosine[nearest] > LEAST_COSINE:
                counts = min(weight[slot], weight[kept[nearest]])
                total[nearest] += counts
                share[nearest] += counts * value[slot]
        grown = total > weight[kept]
        count = len(kept)
        mean = (share / total[:, None]).to(after["value_cache"].dtype)
        after["value_cache"][b, h, :count] = torch.where(grown[:, None], mean, after["value_cache"][b, h, :count])
        after["slot_bias"][b, h, :count] += (total / weight[kept]).log()

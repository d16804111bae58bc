"""`MergeDropped` in what TensorRT builds: no shape follows from what is dropped, and no scatter adds.

A loop takes the cache's slots a tile at a time, finds for each that is dropped the slot that stays and is most like it,
and adds its share there by a product with a matrix of zeros and weights. It computes what the portable body does, with
the sums in another order; ONNX Runtime takes several times as long for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from semkv_deploy.methods.merging import CONSTANTS, KEPT_ROWS, MEANS, UNITS, parse_body

if TYPE_CHECKING:
    import onnx

TILE = 128
"""Slots of a round: cosines are `[B,H,TILE,C]`."""

_BODY = """
    CONSTANTS
    UNITS
    unit_columns = Transpose <perm = [0, 1, 3, 2]> (unit)
    value_f = Cast <to = 1> (value_cache)
    is_free = GreaterOrEqual (slot, frozen)
    takes = And (is_kept, is_free)
    takes_row = Unsqueeze (takes, slot_axis)
    tile = Constant <value_int = TILE> ()
    tile_less_one = Constant <value_int = LAST_OF_TILE> ()
    capacity_up = Add (capacity, tile_less_one)
    rounds = Div (capacity_up, tile)
    in_tile = Range (zero, tile, one)
    last_slot = Sub (capacity, one)
    yes = Constant <value = bool {1}> ()
    weight_column = Unsqueeze (weight, channel_axis)
    share_own = Mul (weight_column, value_f)
    total_weight, total_share = Loop (rounds, yes, weight, share_own) <
        body: graph = merge_tile (int64 round, bool round_on, float[] weight_before, float[] share_before)
            => (goes_on, weight_after, share_after) {
            goes_on = Identity (round_on)
            first = Mul (round, tile)
            wanted = Add (first, in_tile)
            from = Min (wanted, last_slot)
            exists = LessOrEqual (wanted, last_slot)
            dropped_any = Gather <axis = 2> (is_dropped, from)
            dropped_here = And (dropped_any, exists)
            unit_here = Gather <axis = 2> (unit, from)
            cosine_any = MatMul (unit_here, unit_columns)
            cosine = Where (takes_row, cosine_any, no_cosine)
            nearest = ArgMax <axis = 3, keepdims = 0> (cosine)
            best = ReduceMax <keepdims = 0> (cosine, channel_axis)
            is_near = Greater (best, least_cosine)
            near_here = And (is_near, dropped_here)
            merges = And (near_here, counts)
            weight_here = Gather <axis = 2> (weight, from)
            nearest_weight = GatherElements <axis = 2> (weight, nearest)
            weight_most = Min (weight_here, nearest_weight)
            weight_given = Where (merges, weight_most, zero_f)
            nearest_column = Unsqueeze (nearest, channel_axis)
            is_nearest = Equal (nearest_column, slot)
            given_column = Unsqueeze (weight_given, channel_axis)
            given = Where (is_nearest, given_column, zero_f)
            given_sum = ReduceSum <keepdims = 0> (given, slot_axis)
            weight_after = Add (weight_before, given_sum)
            value_here = Gather <axis = 2> (value_f, from)
            given_rows = Transpose <perm = [0, 1, 3, 2]> (given)
            share_given = MatMul (given_rows, value_here)
            share_after = Add (share_before, share_given)
        }
    >
    KEPT_ROWS
    kept_there = GreaterOrEqual (keep_index, zero)
    total_any = GatherElements <axis = 2> (total_weight, kept_from)
    total_kept = Where (kept_there, total_any, weight_kept)
    share_kept = GatherElements <axis = 2> (total_share, kept_rows)
    MEANS
"""


def function_proto(tile: int = TILE) -> onnx.FunctionProto:
    """The function's body for TensorRT; every shape follows from the input shapes."""
    parts = {"CONSTANTS": CONSTANTS, "UNITS": UNITS, "KEPT_ROWS": KEPT_ROWS, "MEANS": MEANS}
    parts |= {"LAST_OF_TILE": str(tile - 1), "TILE": str(tile)}
    body = _BODY
    for name, text in parts.items():
        body = body.replace(name, text)
    return parse_body(body)

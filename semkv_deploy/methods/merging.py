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
    from torch import Tensor

LEAST_COSINE = 0.5
"""Between keys. Below it two keys are looked at by different queries, and one cannot stand for the other."""

TINY = 1e-12

MERGED = f"""
    channel_axes = Constant <value = int64[1] {{3}}> ()
    slots_axes = Constant <value = int64[3] {{1, 2, 3}}> ()
    no_cosine = Constant <value = float {{-2.0}}> ()
    least_cosine = Constant <value = float {{{LEAST_COSINE}}}> ()
    tiny = Constant <value = float {{{TINY:.15f}}}> ()
    none = Constant <value = float {{0.0}}> ()

    not_kept = Not (is_kept)
    is_live = Not (is_dead)
    is_dropped = And (not_kept, is_live)
    dropped_number = Cast <to = 7> (is_dropped)
    dropped_so_far = CumSum (dropped_number, minus_one)
    place_dropped = Sub (dropped_so_far, one)
    place_of_dropped = Where (is_dropped, place_dropped, last_slot)
    dropped_named = Where (is_dropped, slot, minus_one)
    dropped_all = ScatterElements <axis = 2> (none_kept, place_of_dropped, dropped_named)
    dropped_most = ReduceMax <keepdims = 1> (evicted)
    dropped_start = Sub (dropped_most, dropped_most)
    dropped_index = Slice (dropped_all, dropped_start, dropped_most, rank_axis)
    dropped_from = Max (dropped_index, zero)
    is_there = GreaterOrEqual (dropped_index, zero)

    head_dim_1 = Shape <start = 3, end = 4> (key_cache)
    one_row = Constant <value = int64[1] {{1}}> ()
    row_shape = Concat <axis = 0> (one_row, one_row, one_row, head_dim_1)
    dropped_column = Unsqueeze (dropped_from, channel_axes)
    dropped_rows = Expand (dropped_column, row_shape)
    key_before = Cast <to = 1> (key_cache)
    value_before = Cast <to = 1> (value_cache)
    dropped_key = GatherElements <axis = 2> (key_before, dropped_rows)
    dropped_value = GatherElements <axis = 2> (value_before, dropped_rows)
    key_kept = Cast <to = 1> (key_cache_out)
    dropped_squares = Mul (dropped_key, dropped_key)
    dropped_square = ReduceSum <keepdims = 1> (dropped_squares, channel_axes)
    dropped_square_bounded = Max (dropped_square, tiny)
    dropped_norm = Sqrt (dropped_square_bounded)
    dropped_unit = Div (dropped_key, dropped_norm)
    kept_squares = Mul (key_kept, key_kept)
    kept_square = ReduceSum <keepdims = 1> (kept_squares, channel_axes)
    kept_square_bounded = Max (kept_square, tiny)
    kept_norm = Sqrt (kept_square_bounded)
    kept_unit = Div (key_kept, kept_norm)
    kept_unit_columns = Transpose <perm = [0, 1, 3, 2]> (kept_unit)
    cosine_any = MatMul (dropped_unit, kept_unit_columns)
    length_kept = Unsqueeze (length_out, slots_axes)
    is_live_kept = Less (slot, length_kept)
    cosine = Where (is_live_kept, cosine_any, no_cosine)
    nearest = ArgMax <axis = 3, keepdims = 0> (cosine)
    best = ReduceMax <keepdims = 0> (cosine, channel_axes)
    is_near = Greater (best, least_cosine)
    counts = Greater (scored, none)
    near_there = And (is_near, is_there)
    merges = And (near_there, counts)

    weight = Exp (score)
    dropped_weight_any = GatherElements <axis = 2> (weight, dropped_from)
    kept_from = Max (keep_index, zero)
    kept_weight = GatherElements <axis = 2> (weight, kept_from)
    nearest_weight = GatherElements <axis = 2> (kept_weight, nearest)
    dropped_weight_most = Min (dropped_weight_any, nearest_weight)
    dropped_weight = Where (merges, dropped_weight_most, none)
    total_weight = ScatterElements <axis = 2, reduction = "add"> (kept_weight, nearest, dropped_weight)
    nearest_column = Unsqueeze (nearest, channel_axes)
    nearest_rows = Expand (nearest_column, row_shape)
    dropped_weight_column = Unsqueeze (dropped_weight, channel_axes)
    dropped_share = Mul (dropped_weight_column, dropped_value)
    value_kept = Cast <to = 1> (value_chosen)
    kept_weight_column = Unsqueeze (kept_weight, channel_axes)
    kept_share = Mul (kept_weight_column, value_kept)
    total_share = ScatterElements <axis = 2, reduction = "add"> (kept_share, nearest_rows, dropped_share)
    total_weight_column = Unsqueeze (total_weight, channel_axes)
    value_mean = Div (total_share, total_weight_column)
    grown = Div (total_weight, kept_weight)
    is_grown = Greater (total_weight, kept_weight)
    is_grown_column = Unsqueeze (is_grown, channel_axes)
    value_merged = Where (is_grown_column, value_mean, value_kept)
    value_cache_out = CastLike (value_merged, value_cache)
    bias_more = Log (grown)
    slot_bias_out = Add (bias_chosen, bias_more)
"""
"""`value_cache_out` and `slot_bias_out`, after `KEEP_HIGHEST` and `CompactCache`, from `score`, the log of weights."""


def merge_dropped(before: dict[str, Tensor], after: dict[str, Tensor], keep: Tensor, score: Tensor) -> None:
    """The reference: changes `slot_bias` and `value_cache` of `after` in place.

    Args:
        before: `key_cache`, `value_cache` `[B,H,C,D]` and `length` `[B]`, before slots were chosen.
        after: `key_cache`, `value_cache`, `slot_bias` `[B,H,C]` and `length` of those that stay.
        keep: `[B,H,C]`, the slots that stay, negative behind the last.
        score: `[B,H,C]`, the log of each slot's weight, before.
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

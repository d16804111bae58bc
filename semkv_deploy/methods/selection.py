"""The selection rule that methods with scores share: sinks, window, then the highest. In ONNX text and slow PyTorch.

A threshold is found by its digits and not by sorting: TensorRT's TopK takes no more than 3,840 of an axis, a cache may
have more slots. Scores are rounded down to a thousandth for it; of equal ones the newest stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

STEPS_PER_UNIT, OFFSET = 1024, 32
"""A score of -32 or less is rank 0; ranks are 1/1024 apart."""

SINK, WINDOW = 65535, 65534
"""Ranks above all scores'."""

_DIGIT = """
    step_{n} = Constant <value = int64 {{{step}}}> ()
    offsets_{n} = Mul (digit, step_{n})
    base_column_{n} = Unsqueeze (base_{n}, last_axis)
    thresholds_{n} = Add (base_column_{n}, offsets_{n})
    thresholds_column_{n} = Unsqueeze (thresholds_{n}, last_axis)
    reaches_{n} = GreaterOrEqual (rank_row, thresholds_column_{n})
    reaches_number_{n} = Cast <to = 1> (reaches_{n})
    reach_{n} = ReduceSum <keepdims = 0> (reaches_number_{n}, last_axis)
    enough_{n} = GreaterOrEqual (reach_{n}, kept_float)
    enough_number_{n} = Cast <to = 7> (enough_{n})
    found_{n} = ReduceSum <keepdims = 0> (enough_number_{n}, last_axis)
    found_offset_{n} = Mul (found_{n}, step_{n})
    base_{m} = Add (base_{n}, found_offset_{n})
"""

KEEP_HIGHEST = f"""
    excess = Sub (length, target)
    over = Greater (excess, zero)
    evicted = Max (excess, zero)
    kept = Min (length, target)
    last_axis = Constant <value = int64[1] {{-1}}> ()
    axes_12 = Constant <value = int64[2] {{1, 2}}> ()
    lowest = Constant <value = float {{-{OFFSET}.0}}> ()
    per_unit = Constant <value = float {{{STEPS_PER_UNIT}.0}}> ()
    rank_least = Constant <value = float {{0.0}}> ()
    rank_most = Constant <value = float {{{WINDOW - 1}.0}}> ()
    rank_sink = Constant <value = int64 {{{SINK}}}> ()
    rank_window = Constant <value = int64 {{{WINDOW}}}> ()
    above_lowest = Sub (pooled, lowest)
    in_steps = Mul (above_lowest, per_unit)
    whole_steps = Floor (in_steps)
    rank_float = Clip (whole_steps, rank_least, rank_most)
    rank_scored = Cast <to = 7> (rank_float)
    length_row = Unsqueeze (length, axes_12)
    recent_row = Unsqueeze (recent, axes_12)
    window_start = Sub (length_row, recent_row)
    in_window = GreaterOrEqual (slot, window_start)
    in_sinks = Less (slot, sinks)
    is_dead = GreaterOrEqual (slot, length_row)
    rank_windowed = Where (in_window, rank_window, rank_scored)
    rank_pinned = Where (in_sinks, rank_sink, rank_windowed)
    rank = Where (is_dead, minus_one, rank_pinned)

    rank_axis = Constant <value = int64[1] {{2}}> ()
    rank_row = Unsqueeze (rank, rank_axis)
    kept_row = Unsqueeze (kept, axes_12)
    kept_float = Cast <to = 1> (kept_row)
    digit = Constant <value = int64[15] {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}}> ()
    rank_first = ReduceMin <keepdims = 0> (rank, last_axis)
    base_0 = Sub (rank_first, rank_first)
    {"".join(_DIGIT.format(n=n, m=n + 1, step=16 ** (3 - n)) for n in range(4))}
    threshold = Unsqueeze (base_4, last_axis)
    is_above = Greater (rank, threshold)
    is_equal = Equal (rank, threshold)
    above_number = Cast <to = 7> (is_above)
    equal_number = Cast <to = 7> (is_equal)
    count_above = ReduceSum <keepdims = 1> (above_number, last_axis)
    count_equal = ReduceSum <keepdims = 1> (equal_number, last_axis)
    room = Sub (kept_row, count_above)
    too_old = Sub (count_equal, room)
    equal_so_far = CumSum (equal_number, minus_one)
    is_new = Greater (equal_so_far, too_old)
    is_chosen = And (is_equal, is_new)
    is_kept = Or (is_above, is_chosen)

    kept_number = Cast <to = 7> (is_kept)
    kept_so_far = CumSum (kept_number, minus_one)
    place_kept = Sub (kept_so_far, one)
    last_slot = Sub (capacity, one)
    place = Where (is_kept, place_kept, last_slot)
    named = Where (is_kept, slot, minus_one)
    rank_shape = Shape (rank)
    none_kept = Expand (minus_one, rank_shape)
    keep_index = ScatterElements <axis = 2> (none_kept, place, named)
"""
"""`keep_index` `[B,H,C]` from scores `pooled` `[B,H,C]`, after `text.SLOTS`; slots stay in their order.

Also defines `over` and `evicted`. What is dropped writes its -1 to the last place, which only a full list uses.
"""


def keep_highest(score: Tensor, length: Tensor, target: Tensor, sinks: int, recent: Tensor) -> Tensor:
    """The reference: `keep_index` `[B,H,C]`."""
    import torch

    keep = torch.full(score.shape, -1)
    for b, h in torch.cartesian_prod(*(torch.arange(size) for size in score.shape[:2])).tolist():
        live = int(length[b])
        rank = ((score[b, h, :live] + OFFSET) * STEPS_PER_UNIT).floor().clamp(0, WINDOW - 1)
        rank[max(live - int(recent[b]), 0) :] = WINDOW
        rank[:sinks] = SINK
        order = sorted(range(live), key=lambda slot: (float(rank[slot]), slot), reverse=True)
        kept = sorted(order[: min(live, int(target[b]))])
        keep[b, h, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return keep

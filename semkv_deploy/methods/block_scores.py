"""One score for all slots of a semantic block: the largest of theirs, their mean, or the logarithm of the mean of the
attention that they are logarithms of ("mass"). In ONNX text and slow PyTorch.

Blocks are runs of live slots with one number in a column, at most `longest` slots. Scores are rounded down to ranks
first, as `selection` does, and attention to steps of 2^-30, so that sums are of integers and all slots of a block get
the same, whatever the order of summation; a mean is rounded down. Runs are joined by doubling: log2(longest) shifts,
and no shape depends on data.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from semkv_deploy.methods.selection import OFFSET, STEPS_PER_UNIT, WINDOW

if TYPE_CHECKING:
    from torch import Tensor

Pool = Literal["max", "mean", "mass"]

ATTENTION_STEPS = 1 << 30
"""Steps of attention, which is 1 at most."""

_SCORES = f"""
    pool_lowest = Constant <value = float {{-{OFFSET}.0}}> ()
    pool_per_unit = Constant <value = float {{{STEPS_PER_UNIT}.0}}> ()
    pool_least = Constant <value = float {{0.0}}> ()
    pool_most = Constant <value = float {{{WINDOW - 1}.0}}> ()
    pool_above = Sub (score, pool_lowest)
    pool_steps = Mul (pool_above, pool_per_unit)
    pool_whole = Floor (pool_steps)
    pool_clipped = Clip (pool_whole, pool_least, pool_most)
    pool_scored = Cast <to = 7> (pool_clipped)
"""

_ATTENTION = f"""
    pool_lowest = Constant <value = float {{-{OFFSET}.0}}> ()
    pool_highest = Constant <value = float {{0.0}}> ()
    pool_per_unit = Constant <value = float {{{ATTENTION_STEPS}.0}}> ()
    pool_within = Clip (score, pool_lowest, pool_highest)
    pool_attention = Exp (pool_within)
    pool_steps = Mul (pool_attention, pool_per_unit)
    pool_whole = Floor (pool_steps)
    pool_scored = Cast <to = 7> (pool_whole)
"""

_RANKS = """
    pool_axes = Constant <value = int64[2] {1, 2}> ()
    pool_length = Unsqueeze (length, pool_axes)
    pool_dead = GreaterOrEqual (slot, pool_length)
    pool_block = Where (pool_dead, minus_one, slot_block)
    pool_rank = Where (pool_dead, zero, pool_scored)
    pool_last = Sub (capacity, one)
    pool_ones = Add (pool_block, one)
    pool_zeros = Sub (pool_ones, pool_ones)
    pool_single = Add (pool_zeros, one)
"""

_SHIFTED = """
    {way}_step_{n} = Constant <value = int64 {{{step}}}> ()
    {way}_from_{n} = {shift} (slot, {way}_step_{n})
    {way}_low_{n} = Max ({way}_from_{n}, zero)
    {way}_slot_{n} = Min ({way}_low_{n}, pool_last)
    {way}_there_{n} = Equal ({way}_slot_{n}, {way}_from_{n})
    {way}_block_{n} = Gather <axis = 2> (pool_block, {way}_slot_{n})
    {way}_alike_{n} = Equal ({way}_block_{n}, pool_block)
    {way}_same_{n} = And ({way}_alike_{n}, {way}_there_{n})
"""

_JOINED = """
    {way}_{what}_near_{n} = Gather <axis = 2> ({way}_{what}_{n}, {way}_slot_{n})
    {way}_{what}_both_{n} = {join} ({way}_{what}_{n}, {way}_{what}_near_{n})
    {way}_{what}_{m} = Where ({way}_same_{n}, {way}_{what}_both_{n}, {way}_{what}_{n})
"""


def pool_text(pool: Pool, longest: int) -> str:
    """Text that defines `pooled` `[B,H,C]` from `score`, `slot_block` and `length`, after `text.SLOTS`."""
    joined = {"rank": "Max"} if pool == "max" else {"rank": "Add", "single": "Add"}
    steps = max(1, math.ceil(math.log2(longest)))
    body = (_ATTENTION if pool == "mass" else _SCORES) + _RANKS
    for way, shift in (("before", "Sub"), ("after", "Add")):
        body += "".join(f"\n    {way}_{what}_0 = Identity (pool_{what})" for what in joined)
        for n in range(steps):
            body += _SHIFTED.format(way=way, n=n, step=2**n, shift=shift)
            for what, join in joined.items():
                body += _JOINED.format(way=way, what=what, join=join, n=n, m=n + 1)
    if pool == "max":
        body += f"\n    pool_result = Max (before_rank_{steps}, after_rank_{steps})"
    else:
        for what in joined:
            # A slot is in both of its halves.
            body += f"""
    total_{what}_twice = Add (before_{what}_{steps}, after_{what}_{steps})
    total_{what} = Sub (total_{what}_twice, pool_{what})"""
        body += "\n    pool_result = Div (total_rank, total_single)"
    if pool == "mass":
        return (
            body
            + """
    pool_at_least = Max (pool_result, one)
    pool_float = Cast <to = 1> (pool_at_least)
    pool_share = Div (pool_float, pool_per_unit)
    pooled = Log (pool_share)
    """
        )
    return (
        body
        + """
    pool_float = Cast <to = 1> (pool_result)
    pool_scaled = Div (pool_float, pool_per_unit)
    pooled = Add (pool_scaled, pool_lowest)
    """
    )


def pool_blocks(score: Tensor, block: Tensor, length: Tensor, pool: Pool) -> Tensor:
    """The reference: `[B,H,C]`, slot by slot; what is in dead slots no rule looks at."""
    import torch

    if pool == "mass":
        rank = (score.clamp(-OFFSET, 0).exp() * ATTENTION_STEPS).floor().long()
    else:
        rank = ((score + OFFSET) * STEPS_PER_UNIT).floor().clamp(0, WINDOW - 1).long()
    result = torch.zeros_like(rank)
    for b, live in enumerate(length.tolist()):
        for h in range(score.shape[1]):
            for slot in range(live):
                own = rank[b, h, :live][block[b, h, :live] == block[b, h, slot]]
                result[b, h, slot] = own.max() if pool == "max" else own.sum() // len(own)
    if pool == "mass":
        return (result.clamp_min(1).float() / ATTENTION_STEPS).log()
    return result.float() / STEPS_PER_UNIT - OFFSET

"""Attention Matching's fit (arXiv 2602.16284) of slots that were chosen: biases first, then values.

What was chosen should give reference queries the attention that the whole cache gave them. With `q` a reference query,
`s` its logits over the whole cache and `t` those over the slots that stay:

* biases: the chosen slots' mass `sum_j exp(t_j) w_j` should be the whole mass `sum_i exp(s_i)`: least squares in `w`,
  kept near 1, bounded; a slot's bias grows by `log w`;
* values: the softmax over the chosen slots, with their new biases, times their values should be the whole cache's
  output: ridge regression that keeps values near what they were.

Both have fewer equations (queries) than unknowns, so they are solved in the queries: `x = A^T (A A^T + l)^-1 r`, by
conjugate gradients of a fixed number of steps. The paper solves the first as non-negative least squares with the bounds
inside; here the solution is bounded afterwards, so that one solver serves both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from semkv_deploy.methods.layout import Buffer
from semkv_deploy.model import names

if TYPE_CHECKING:
    from torch import Tensor

QUERIES = 128
"""Reference queries of a KV head, of all its query heads together."""

REFERENCE_QUERIES = Buffer(name=names.REFERENCE_QUERIES, shape=f"B,Hkv,{QUERIES},D", dtype="float32")
"""Scaled; zero where there is none. A compression uses them up: keys that are appended afterwards lie behind them, and
what a query would give a key that it never saw says nothing."""

STEPS = 40
"""Of conjugate gradients. What they leave unsolved is what is seen least."""

RIDGE = 0.05
"""Of the mean of the diagonal of `A A^T`."""

LARGEST = 3.0
"""A slot counts at most e^3 times, and at least e^-3 times, as much as before."""

TINY = 1e-20

_SOLVE = """
    {p}_transposed = Transpose <perm = [0, 1, 3, 2]> ({matrix})
    {p}_gram = MatMul ({matrix}, {p}_transposed)
    {p}_entries = Mul ({matrix}, {matrix})
    {p}_diagonal = ReduceSum <keepdims = 1> ({p}_entries, slot_axis)
    {p}_trace = ReduceSum <keepdims = 1> ({p}_diagonal, query_axis)
    {p}_mean = Div ({p}_trace, used_count)
    {p}_ridge = Mul ({p}_mean, ridge)
    {p}_zero = Sub ({wanted}, {wanted})
    {p}_squares = Mul ({wanted}, {wanted})
    {p}_square = ReduceSum <keepdims = 1> ({p}_squares, query_axis)
    {p}_solution, {p}_residual, {p}_direction, {p}_rest = Loop <
        body = {p}_step (
            int64 number, bool going, float[b,h,r,d] solution, float[b,h,r,d] residual, float[b,h,r,d] direction,
            float[b,h,one,d] square
        ) => (
            bool goes_on, float[b,h,r,d] solution_next, float[b,h,r,d] residual_next, float[b,h,r,d] direction_next,
            float[b,h,one,d] square_next
        ) {{
            goes_on = Identity (going)
            product = MatMul ({p}_gram, direction)
            damped = Mul ({p}_ridge, direction)
            image = Add (product, damped)
            along = Mul (direction, image)
            curvature = ReduceSum <keepdims = 1> (along, query_axis)
            curvature_bounded = Max (curvature, tiny)
            length_of_step = Div (square, curvature_bounded)
            change = Mul (length_of_step, direction)
            solution_next = Add (solution, change)
            fall = Mul (length_of_step, image)
            residual_next = Sub (residual, fall)
            squares = Mul (residual_next, residual_next)
            square_next = ReduceSum <keepdims = 1> (squares, query_axis)
            square_bounded = Max (square, tiny)
            share = Div (square_next, square_bounded)
            carried = Mul (share, direction)
            direction_next = Add (residual_next, carried)
        }}
    > (steps, yes, {p}_zero, {wanted}, {wanted}, {p}_square)
    {p}_solved = MatMul ({p}_transposed, {p}_solution)
"""
"""`{p}_solved`: `matrix^T x` with `(matrix matrix^T + ridge) x = wanted`; matrix `[B,H,R,C]`, wanted `[B,H,R,·]`."""


_BIAS = f"""
    query_axis = Constant <value = int64[1] {{2}}> ()
    slot_axis = Constant <value = int64[1] {{3}}> ()
    tiny = Constant <value = float {{{TINY:.20f}}}> ()
    ridge = Constant <value = float {{{RIDGE}}}> ()
    steps = Constant <value = int64 {{{STEPS}}}> ()
    yes = Constant <value = bool {{1}}> ()
    far = Constant <value = float {{-1e30}}> ()
    none = Constant <value = float {{0.0}}> ()
    unit = Constant <value = float {{1.0}}> ()

    query_size = Abs (reference_queries)
    query_largest = ReduceMax <keepdims = 1> (query_size, slot_axis)
    query_there = Greater (query_largest, none)
    over_rows = Unsqueeze (over, slots_axes)
    query_counts = And (query_there, over_rows)
    query_number = Cast <to = 1> (query_counts)
    used = Mul (query_number, scored)
    used_sum = ReduceSum <keepdims = 1> (used, query_axis)
    used_count = Max (used_sum, unit)

    key_whole = Cast <to = 1> (key_cache)
    key_whole_columns = Transpose <perm = [0, 1, 3, 2]> (key_whole)
    logits_plain = MatMul (reference_queries, key_whole_columns)
    bias_whole = Unsqueeze (slot_bias, query_axis)
    logits_biased = Add (logits_plain, bias_whole)
    length_rows = Unsqueeze (length, slots_axes)
    live_whole = Less (slot, length_rows)
    logits_whole = Where (live_whole, logits_biased, far)
    logits_largest = ReduceMax <keepdims = 1> (logits_whole, slot_axis)
    logits_below = Sub (logits_whole, logits_largest)
    masses = Exp (logits_below)
    mass = ReduceSum <keepdims = 1> (masses, slot_axis)

    key_kept = Cast <to = 1> (key_cache_out)
    key_kept_columns = Transpose <perm = [0, 1, 3, 2]> (key_kept)
    kept_plain = MatMul (reference_queries, key_kept_columns)
    bias_kept = Unsqueeze (bias_chosen, query_axis)
    kept_biased = Add (kept_plain, bias_kept)
    length_kept = Unsqueeze (length_out, slots_axes)
    live_kept = Less (slot, length_kept)
    kept_logits = Where (live_kept, kept_biased, far)
    kept_below = Sub (kept_logits, logits_largest)
    kept_masses = Exp (kept_below)
    kept_shares = Div (kept_masses, mass)
    shares = Mul (kept_shares, used)
    share_kept = ReduceSum <keepdims = 1> (shares, slot_axis)
    lost = Sub (used, share_kept)
    {_SOLVE.format(p="bias", matrix="shares_FREE", wanted="lost")}
    counted = Add (bias_solved, unit)
    counted_least = Constant <value = float {{{math.exp(-LARGEST):.8f}}}> ()
    counted_most = Constant <value = float {{{math.exp(LARGEST):.8f}}}> ()
    counted_within = Clip (counted, counted_least, counted_most)
    bias_more_column = Log (counted_within)
    bias_more = Squeeze (bias_more_column, slot_axis)
    slot_bias_out = Add (bias_chosen, bias_more)
"""

_VALUES = f"""
    bias_fitted = Unsqueeze (bias_more, query_axis)
    fitted_biased = Add (kept_logits, bias_fitted)
    fitted_weights = Softmax <axis = -1> (fitted_biased)
    weights_kept = Mul (fitted_weights, used)
    weights_whole = Div (masses, mass)
    value_whole = Cast <to = 1> (value_cache)
    output_whole = MatMul (weights_whole, value_whole)
    output_wanted = Mul (output_whole, used)
    value_kept = Cast <to = 1> (value_chosen)
    output_kept = MatMul (weights_kept, value_kept)
    output_lost = Sub (output_wanted, output_kept)
    {_SOLVE.format(p="value", matrix="weights_kept_FREE", wanted="output_lost")}
    value_fitted = Add (value_kept, value_solved)
    value_cache_out = CastLike (value_fitted, value_cache)
"""


_FREE = """
    is_free = GreaterOrEqual (slot, sinks)
    free_number = Cast <to = 1> (is_free)
"""

# Of a column that is 0 the solution is 0, so that a bias grows by log 1, and a value by 0.
_FREE_SHARES = "shares_free = Mul (shares, free_number)"
_FREE_WEIGHTS = "weights_kept_free = Mul (weights_kept, free_number)"


def fitted(values_too: bool, below_sinks_frozen: bool = False) -> str:
    """ONNX text after `CompactCache` gave `key_cache_out`, `value_chosen`, `bias_chosen` and `length_out`.

    Args:
        values_too: values are fitted as well, not biases only.
        below_sinks_frozen: slots below `sinks` stay as they are, and rows in which nothing is dropped keep their
            queries: another run may be theirs.
    """
    values = _VALUES if values_too else "value_cache_out = Identity (value_chosen)"
    bias, used_up, free = _BIAS, "Sub (reference_queries, reference_queries)", ""
    if below_sinks_frozen:
        bias = bias.replace("lost = Sub (used, share_kept)", f"lost = Sub (used, share_kept)\n{_FREE_SHARES}")
        values = values.replace(
            "output_kept = MatMul (weights_kept, value_kept)",
            f"output_kept = MatMul (weights_kept, value_kept)\n{_FREE_WEIGHTS}",
        )
        used_up, free = "Where (over_rows, none, reference_queries)", "_free"
    return f"""
        slots_axes = Constant <value = int64[3] {{1, 2, 3}}> ()
        {_FREE if below_sinks_frozen else ""}
        {bias.replace("_FREE", free)}
        {values.replace("_FREE", free)}
        reference_queries_out = {used_up}
    """


def native_fitted(values_too: bool) -> str:
    """Text in place of `CompactCache` and `fitted`, by the form of the operator that does both (`ops.native`)."""
    return f"""
        key_cache_out, value_cache_out, slot_bias_out, length_out =
            semkv.CompactCache_fitted <values: int = {int(values_too)}> (
                key_cache, value_cache, slot_bias, keep_index, length, target, scored, reference_queries)
        reference_queries_out = Sub (reference_queries, reference_queries)
    """


def fit_slots(
    before: dict[str, Tensor], after: dict[str, Tensor], counts: Tensor, values_too: bool, frozen: int = 0
) -> None:
    """The reference: changes `slot_bias` and `value_cache` of `after` in place.

    Args:
        before: `key_cache`, `value_cache` `[B,H,C,D]`, `slot_bias` `[B,H,C]`, `length` `[B]` and `reference_queries`
            `[B,H,R,D]`, before slots were chosen.
        after: the same of those that stay, without `reference_queries`.
        counts: `[B]` bool: in other rows nothing was dropped, or nothing is to be fitted.
        values_too: values are fitted as well, not biases only.
        frozen: the first so many slots stay as they are.
    """
    import torch

    batch, heads = before["slot_bias"].shape[:2]
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        queries = before["reference_queries"][b, h]
        queries = queries[queries.abs().amax(-1) > 0]
        live, kept = int(before["length"][b]), int(after["length"][b])
        if not bool(counts[b]) or not len(queries) or not kept:
            continue
        key, value = (before[name][b, h, :live].float() for name in ("key_cache", "value_cache"))
        logits = queries @ key.T + before["slot_bias"][b, h, :live]
        largest = logits.amax(-1, keepdim=True)
        mass = (logits - largest).exp().sum(-1, keepdim=True)
        chosen = queries @ after["key_cache"][b, h, :kept].float().T + after["slot_bias"][b, h, :kept]
        shares = (chosen - largest).exp() / mass
        free = (torch.arange(kept) >= frozen).float()
        counted = 1 + _least_squares(shares * free, 1 - shares.sum(-1, keepdim=True))[:, 0]
        more = counted.clamp(math.exp(-LARGEST), math.exp(LARGEST)).log()
        after["slot_bias"][b, h, :kept] += more
        if values_too:
            weights = (chosen + more).softmax(-1)
            values = after["value_cache"][b, h, :kept]
            lost = logits.softmax(-1) @ value - weights @ values.float()
            values += _least_squares(weights * free, lost).to(values.dtype)


def _least_squares(matrix: Tensor, wanted: Tensor) -> Tensor:
    """`matrix^T x` with `(matrix matrix^T + ridge) x = wanted`, in the graph's steps."""
    gram = matrix @ matrix.T
    ridge = RIDGE * gram.diagonal().mean()
    solution, residual, direction = wanted * 0, wanted, wanted
    square = (residual * residual).sum(0)
    for _ in range(STEPS):
        image = gram @ direction + ridge * direction
        length = square / (direction * image).sum(0).clamp_min(TINY)
        solution, residual = solution + length * direction, residual - length * image
        before, square = square, (residual * residual).sum(0)
        direction = residual + square / before.clamp_min(TINY) * direction
    return matrix.T @ solution

"""Budgets and the static-budget profiles they become.

A budget is the share of cache entries kept, 0 < b <= 1; slots or bytes that a user gives become the largest share that
does not exceed them. Built, it is a capacity: the number of slots every layer's buffers have, with everything in it
(sinks, recent window, open turn, room for the next append).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from semkv_deploy.budget_units import MIN_CAPACITY, Budget, BudgetLike, parse_budget
from semkv_deploy.errors import SemkvError


class StaticProfile(BaseModel):
    """One budget, built.

    Attributes:
        budget: share of cache entries kept.
        capacity: slots per layer and batch row; a hard cap.
        prefill_chunk: rows a prompt is cut into; bounds the activations, so that memory is bounded by the capacity.
        target: slots that may stay when a full cache is compressed; `capacity - target` is room for what comes next.
        cache_bytes: key and value bytes of all layers for one batch row.
    """

    model_config = ConfigDict(frozen=True)

    budget: float
    capacity: int
    prefill_chunk: int
    target: int
    cache_bytes: int

    @property
    def label(self) -> str:
        """The budget as users write it, and as papers do: `0.2 (80 % compression)`."""
        return f"{self.budget:g} ({round((1 - self.budget) * 100):d} % compression)"


def static_profile(
    budget: BudgetLike, max_context: int, *, bytes_per_slot: int, prefill_chunk: int = 128
) -> StaticProfile:
    """Returns the profile of `budget` at `max_context` tokens.

    Args:
        budget: share of entries kept, or slots or bytes that are not exceeded.
        max_context: most tokens a conversation may have.
        bytes_per_slot: key and value bytes of one slot over all layers.
        prefill_chunk: most rows of one prefill run; smaller where the capacity is small.

    Raises:
        SemkvError: when the capacity would be too small to hold sinks, a window and the next append.
    """
    budget = parse_budget(budget).resolve(max_context, bytes_per_slot)
    capacity = Budget(budget).slots(max_context, bytes_per_slot)
    if capacity < MIN_CAPACITY:
        raise SemkvError(
            f"budget {budget:g} of {max_context} tokens is a capacity of {capacity} slots, too few to hold anything",
            where="--budget",
            expected=f"at least {MIN_CAPACITY} slots",
            fix=f"raise --budget to {MIN_CAPACITY / max_context:.2f} or more, or raise --max-context",
        )
    chunk = min(prefill_chunk, capacity // 4)
    return StaticProfile(
        budget=budget,
        capacity=capacity,
        prefill_chunk=chunk,
        # A quarter of the slots is given back at each compression: fewer, larger compressions cost less time, and a
        # smaller share would be filled by the next two prefill chunks.
        target=capacity - max(chunk, capacity // 4),
        cache_bytes=capacity * bytes_per_slot,
    )

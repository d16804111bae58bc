"""Budgets and the static-budget profiles they become.

A budget is the share of cache entries kept, 0 < b <= 1; slots or bytes that a user gives become the largest share that
does not exceed them. Built, it is a capacity: the number of slots a cache group's buffers have, with everything in it
(sinks, recent window, open turn, room for the next append).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from semkv_deploy.budget_units import MIN_CAPACITY, SLOT_MULTIPLE, Budget, BudgetLike, parse_budget
from semkv_deploy.errors import SemkvError
from semkv_deploy.model.cache_groups import CacheGroup, GroupShare, symbols


class BudgetProfile(BaseModel):
    """One budget of a model's cache, built.

    Attributes:
        budget: share of cache entries kept, over all groups.
        prefill_chunk: rows a prompt is cut into; bounds the activations, so that memory is bounded by the capacity.
        cache_bytes: key and value bytes of all groups for one batch row.
        groups: capacities by cache group.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: float
    prefill_chunk: int
    cache_bytes: int
    groups: tuple[CacheGroup, ...]

    @property
    def capacity(self) -> int:
        """Slots of the largest group; of every group, where all have one share."""
        return max(group.capacity for group in self.groups)

    @property
    def keep_slots(self) -> int:
        """Slots that may stay when the largest group is compressed from full."""
        return max(group.keep_slots for group in self.groups)

    @property
    def shares(self) -> tuple[float, ...]:
        """By group, the share of its heads' entries that it keeps: the budget, where all groups have one capacity."""
        slots = sum(len(group.heads) * group.keep_slots for group in self.groups)
        mean = slots / sum(len(group.heads) for group in self.groups)
        return tuple(min(1.0, self.budget * (group.keep_slots / mean)) for group in self.groups)


def label(budget: float) -> str:
    """A budget as users write it, and as papers do: `0.2 (80 % compression)`."""
    return f"{budget:g} ({round((1 - budget) * 100):d} % compression)"


DEFAULT_MAX_CONTEXT = 8192
"""Tokens of a conversation where nothing else is asked for and the model takes as many."""


def choose_context(max_context: int | None, limit: int) -> int:
    """The most tokens a conversation may have (None: the model's limit, at most 8,192).

    Raises:
        SemkvError: when more are asked for than the model takes.
    """
    context = min(limit, DEFAULT_MAX_CONTEXT) if max_context is None else max_context
    if not 0 < context <= limit:
        what = "beyond the model's context" if context > limit else "out of range"
        raise SemkvError(what, where="--max-context", expected=f"1 to {limit} tokens", got=context)
    return context


def budget_profile(
    budget: BudgetLike,
    max_context: int,
    *,
    bytes_per_slot: int,
    groups: Sequence[GroupShare],
    names: Sequence[str] | None = None,
    prefill_chunk: int = 128,
    reads_again: bool = False,
) -> BudgetProfile:
    """The profile of `budget` at `max_context` tokens.

    Args:
        budget: share of entries kept, or slots or bytes that are not exceeded.
        max_context: most tokens a conversation may have.
        bytes_per_slot: key and value bytes of one slot over all layers and heads.
        groups: cache groups and their shares.
        names: of their capacities; None: what `cache_groups.symbols` makes of these shares.
        prefill_chunk: most rows of one prefill run; smaller where a capacity is small.
        reads_again: for a method that reads again what was appended: room for a piece stays free.

    Raises:
        SemkvError: when a capacity would be too small to hold sinks, a window and the next append.
    """
    budget = parse_budget(budget).resolve(max_context, bytes_per_slot)
    whole = Budget(1.0).slots(max_context, bytes_per_slot)
    mean = Budget(budget).slots(max_context, bytes_per_slot)
    if mean < MIN_CAPACITY:
        raise SemkvError(
            f"budget {budget:g} of {max_context} tokens is a capacity of {mean} slots, too few to hold anything",
            where="--budget",
            expected=f"at least {MIN_CAPACITY} slots",
            fix=f"raise --budget to {MIN_CAPACITY / max_context:.2f} or more, or raise --max-context",
        )
    capacities = group_capacities(mean, whole, groups)
    # Where tokens are read again, two pieces have room in the quarter that a compression frees: what comes next, and
    # what is read again before it comes.
    chunk = min(prefill_chunk, min(capacities) // (8 if reads_again else 4))
    heads = sum(len(group.heads) for group in groups)
    slots = sum(len(group.heads) * capacity for group, capacity in zip(groups, capacities, strict=True))
    return BudgetProfile(
        budget=budget,
        prefill_chunk=chunk,
        cache_bytes=slots * bytes_per_slot // heads,
        groups=tuple(
            CacheGroup(
                layer=group.layer,
                heads=group.heads,
                capacity=capacity,
                # A quarter of the slots is given back at each compression: fewer, larger compressions cost less time,
                # and a smaller share would be filled by the next two prefill chunks.
                keep_slots=capacity - max(chunk, capacity // 4),
                symbol=symbol,
            )
            for group, capacity, symbol in zip(groups, capacities, names or symbols(groups), strict=True)
        ),
    )


def group_capacities(mean: int, whole: int, groups: Sequence[GroupShare]) -> list[int]:
    """Capacities that are multiples of 64, in proportion to the groups' shares, and on average `mean` at most.

    A group gets 64 at least and `whole` at most; what that takes or leaves is shared by the others.
    """
    if len({group.share for group in groups}) == 1:
        return [mean] * len(groups)
    heads = [len(group.heads) for group in groups]
    # In blocks of 64 slots. A share's clipping moves all others, so the factor is found by bisection: what is used
    # grows with it.
    total, most = sum(heads) * mean // SLOT_MULTIPLE, whole // SLOT_MULTIPLE

    def blocks(factor: float) -> list[int]:
        return [min(max(int(group.share * factor), 1), most) for group in groups]

    def used(factor: float) -> int:
        return sum(count * size for count, size in zip(heads, blocks(factor), strict=True))

    low, high = 0.0, (most + 1) / min(group.share for group in groups)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if used(middle) <= total else (low, middle)
    sizes = blocks(low)
    _give_rest(sizes, heads, [group.share for group in groups], total, most)
    return [size * SLOT_MULTIPLE for size in sizes]


def _give_rest(sizes: list[int], heads: list[int], shares: list[float], total: int, most: int) -> None:
    """Gives what rounding down left of `total` blocks: a block to all groups of a share, the largest first, in place.

    Groups of one share stay alike, and one of a smaller share never gets more.
    """
    above = most
    for share in sorted(set(shares), reverse=True):
        alike = [number for number, each in enumerate(shares) if each == share]
        cost = sum(heads[number] for number in alike)
        used = sum(count * size for count, size in zip(heads, sizes, strict=True))
        if used + cost <= total and sizes[alike[0]] < above:
            for number in alike:
                sizes[number] += 1
        above = sizes[alike[0]]

"""How a budget is shared among layers and KV heads: as asked for, or by how much their slots are looked at.

Static capacities: found once, from texts that are read again (`compiler.reading`), and built into the bundle. All slots
of all heads are ranked together by the attention they get; a head's share is how many of its slots are in the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.budget import BudgetProfile, budget_profile
from semkv_deploy.errors import SemkvError
from semkv_deploy.model.cache_groups import GroupShare, check_groups, parse_groups, symbols

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.choices import BudgetBy
    from semkv_deploy.methods.calibration import Reading
    from semkv_deploy.model.config import ModelFacts

STEPS = 2
"""Classes of shares for each doubling: heads of a layer that are of one class at every budget share a cache group, and
groups of one class a capacity."""

LEAST = 1 / 2
"""A head gets this part of the mean at least: room for sinks, a window and the next append. Prompts are cut into pieces
of a quarter of the smallest capacity, of an eighth where they are read again, so that a smaller one would make prefill
slow."""


def cache_groups(
    groups: Sequence[GroupShare] | str | None, budget_by: BudgetBy, model: ModelFacts
) -> tuple[GroupShare, ...]:
    """The groups that were asked for, in order.

    Raises:
        SemkvError: when they are not the model's KV heads, each once, or are to be calibrated as well.
    """
    if groups is not None and budget_by != "uniform":
        raise SemkvError(
            "cache groups are given, and are to be calibrated",
            where=f"--cache-groups, --budget-by {budget_by}",
            fix="leave one of them out",
        )
    if groups is None or isinstance(groups, str):
        return parse_groups(groups, model.layers, model.kv_heads)
    return check_groups(groups, model.layers, model.kv_heads)


def make_profiles(
    budgets: Sequence[float],
    context: int,
    model: ModelFacts,
    of_budgets: Sequence[tuple[GroupShare, ...]],
    reads_again: bool = False,
) -> tuple[BudgetProfile, ...]:
    """One profile for each budget, with its shares of the cache groups; `reads_again` as in `budget_profile`."""
    names = symbols(*of_budgets)
    slot = model.cache_bytes_per_token
    return tuple(
        budget_profile(budget, context, bytes_per_slot=slot, groups=groups, names=names, reads_again=reads_again)
        for budget, groups in zip(budgets, of_budgets, strict=True)
    )


def calibrated_shares(
    readings: Sequence[Reading],
    model: ModelFacts,
    budgets: Sequence[float],
    by: BudgetBy,
    *,
    sinks: int,
    recent_share: float,
) -> list[tuple[GroupShare, ...]]:
    """For each budget the cache groups and their shares; the groups are the same in all.

    Args:
        sinks, recent_share: of the method: slots that every head keeps.
    """
    classes = np.stack([_classes(readings, model, budget, by, sinks, recent_share) for budget in budgets])
    groups: list[tuple[int, tuple[int, ...]]] = []
    for layer in range(model.layers):
        alike: dict[bytes, list[int]] = {}
        for head in range(model.kv_heads):
            alike.setdefault(classes[:, layer, head].tobytes(), []).append(head)
        groups += [(layer, tuple(heads)) for heads in alike.values()]
    groups.sort()
    return [
        tuple(
            GroupShare(layer=layer, heads=heads, share=round(2.0 ** (int(of_budget[layer, heads[0]]) / STEPS), 4))
            for layer, heads in groups
        )
        for of_budget in classes
    ]


def _classes(
    readings: Sequence[Reading], model: ModelFacts, budget: float, by: BudgetBy, sinks: int, recent_share: float
) -> NDArray[np.int64]:
    """`[layers,heads]`: the logarithm of a head's part relative to the mean, in steps; 0 is the mean."""
    part = np.mean([wanted_slots(each, model, budget, sinks, recent_share) for each in readings], axis=0)
    if by == "layer":
        part = np.broadcast_to(part.mean(1, keepdims=True), part.shape)
    relative = np.maximum(part / budget, LEAST)
    return np.rint(STEPS * np.log2(relative)).astype(np.int64)


def wanted_slots(
    reading: Reading, model: ModelFacts, budget: float, sinks: int, recent_share: float
) -> NDArray[np.float64]:
    """`[layers,heads]`: the part of its slots that each head keeps, when those most looked at are kept over all heads.

    A layer with a sliding window is looked at no further back than that: it gets the budget, and takes no part.
    """
    ranked = [layer for layer in range(model.layers) if not model.windows[layer]]
    part = np.full((model.layers, model.kv_heads), budget)
    if not ranked:
        return part
    attention: NDArray[Any] = np.stack([reading.attention[layer] for layer in ranked]).astype(np.float64)
    tokens = attention.shape[-1]
    attention[..., :sinks] = np.inf
    attention[..., tokens - int(recent_share * budget * tokens) :] = np.inf
    count = max(1, int(budget * attention.size))
    least = np.partition(attention.reshape(-1), attention.size - count)[attention.size - count]
    part[ranked] = (attention >= least).mean(-1)
    return part

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semkv_deploy.budget import BudgetProfile, budget_profile, group_capacities, label
from semkv_deploy.budget_units import MIN_CAPACITY
from semkv_deploy.errors import SemkvError
from semkv_deploy.model.cache_groups import GroupShare, by_layer, one_a_head, one_a_layer


def static_profile(budget: Any, max_context: int, **options: Any) -> BudgetProfile:
    """The profile of one cache group: what every layer gets where all have one share."""
    return budget_profile(budget, max_context, groups=one_a_layer(1, 1), **options)


def test_profile_of_a_fifth_of_8192():
    profile = static_profile(0.2, 8192, bytes_per_slot=46080)
    assert profile.capacity == 1664
    assert profile.cache_bytes == 1664 * 46080
    assert label(profile.budget) == "0.2 (80 % compression)"


@given(st.floats(0.01, 1), st.integers(128, 200_000))
def test_capacity_is_a_cap_rounded_up(budget: float, context: int):
    try:
        profile = static_profile(budget, context, bytes_per_slot=1)
    except SemkvError as error:
        assert "too few" in str(error)
        return
    assert profile.capacity % 64 == 0 and profile.capacity >= MIN_CAPACITY
    assert budget * context <= profile.capacity + 1e-6 and profile.capacity < budget * context + 64
    assert 0 < profile.keep_slots < profile.capacity
    # After a compression, at least one whole prefill chunk fits.
    assert profile.keep_slots + profile.prefill_chunk <= profile.capacity
    again = static_profile(budget, context, bytes_per_slot=1, reads_again=True)
    assert (again.capacity, again.keep_slots) == (profile.capacity, profile.capacity - profile.capacity // 4)
    # And beside it a piece that is read again.
    assert again.keep_slots + 2 * again.prefill_chunk <= again.capacity


@pytest.mark.parametrize("budget", ["1700tokens", "74MiB"])
def test_profile_of_slots_and_bytes(budget: str):
    profile = static_profile(budget, 8192, bytes_per_slot=46080)
    assert (profile.capacity, profile.cache_bytes, label(profile.budget)) == (
        1664,
        1664 * 46080,
        "0.2031 (80 % compression)",
    )


shares = st.lists(st.tuples(st.floats(0.05, 20), st.integers(1, 8)), min_size=1, max_size=12)


@given(shares, st.floats(0.05, 1), st.integers(256, 40_000))
def test_capacities_by_group_never_exceed_the_budget(given: list[tuple[float, int]], budget: float, context: int):
    groups = tuple(
        GroupShare(layer=number, heads=tuple(range(heads)), share=share) for number, (share, heads) in enumerate(given)
    )
    heads = sum(len(group.heads) for group in groups)
    try:
        equal = static_profile(budget, context, bytes_per_slot=heads)
        profile = budget_profile(budget, context, bytes_per_slot=heads, groups=groups)
    except SemkvError as error:
        assert "too few" in str(error)
        return
    capacities = [group.capacity for group in profile.groups]
    assert profile.cache_bytes == sum(len(g.heads) * g.capacity for g in profile.groups) <= equal.cache_bytes
    assert all(64 <= capacity < context + 64 and capacity % 64 == 0 for capacity in capacities)
    assert all(0 < g.keep_slots <= g.capacity - profile.prefill_chunk for g in profile.groups)
    # A larger share never gets less, and one name in shapes is one capacity.
    ordered = sorted(zip((group.share for group in groups), capacities, strict=True))
    assert [capacity for _, capacity in ordered] == sorted(capacities)
    assert len({(g.symbol, g.capacity) for g in profile.groups}) == len({g.symbol for g in profile.groups})
    assert all(0 < share <= 1 for share in profile.shares)


def test_what_one_group_cannot_take_the_others_get():
    profile = budget_profile(0.5, 1024, bytes_per_slot=4, groups=by_layer([1, 1, 1, 100], 1))
    assert [group.capacity for group in profile.groups] == [320, 320, 320, 1024]
    assert sum(group.capacity for group in profile.groups) <= 4 * 512


@pytest.mark.parametrize(
    "mean, shares, blocks",
    [
        (448, [1, 2, 3, 3], [3, 7, 9, 9]),
        (192, [1, 1, 1.5], [2, 2, 5]),
        (128, [1, 0.25, 1, 1], [2, 2, 2, 2]),
        (192, [0.25, 0.5, 1, 1, 1.5, 2], [1, 1, 3, 3, 4, 6]),
    ],
)
def test_what_rounding_down_leaves_is_given_to_whole_shares(mean: int, shares: list[float], blocks: list[int]):
    """The largest share first, if all of its groups can have a block of 64 more; a smaller one never gets more."""
    capacities = group_capacities(mean, 8192, by_layer(shares, 1))
    assert [capacity / 64 for capacity in capacities] == blocks and sum(blocks) == len(shares) * mean // 64


def test_groups_of_one_share_are_what_layers_are():
    groups = budget_profile(0.2, 8192, bytes_per_slot=1, groups=one_a_head(2, 3)).groups
    assert {(group.capacity, group.symbol) for group in groups} == {(1664, "capacity")} and len(groups) == 6

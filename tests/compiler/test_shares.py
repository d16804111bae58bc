"""A budget shared by what is looked at: on readings made up, in which some layers and heads are looked at more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from semkv_deploy.budget import budget_profile
from semkv_deploy.compiler.shares import LEAST, calibrated_shares, wanted_slots
from semkv_deploy.methods.calibration import Reading
from semkv_deploy.model.cache_groups import symbols

LAYERS, HEADS, TOKENS = 3, 2, 640
NONE: dict[str, Any] = {"sinks": 0, "recent_share": 0.0}


def model(windows: tuple[int, ...] = (0,) * LAYERS) -> Any:
    return SimpleNamespace(layers=LAYERS, kv_heads=HEADS, windows=windows)


def reading(strength: list[list[float]], seed: int = 0) -> Reading:
    """Attention that is uniform between 0 and a head's strength."""
    random = np.random.default_rng(seed)
    attention = [random.uniform(0, 1, (HEADS, TOKENS)) * np.array(heads)[:, None] for heads in strength]
    return Reading([], [], [each.astype(np.float32) for each in attention])


UNEVEN = [[1.0, 0.1], [1.0, 1.0], [0.1, 0.1]]


def test_heads_get_what_part_of_the_most_looked_at_slots_they_have():
    """Three of six heads have all large values: at 0.25 they share 1.5 heads' slots."""
    found = wanted_slots(reading(UNEVEN), model(), 0.25, **NONE)
    np.testing.assert_allclose(found, [[0.5, 0], [0.5, 0.5], [0, 0]], atol=0.08)
    assert found.mean() == pytest.approx(0.25, abs=1e-3)


def test_sinks_and_window_are_every_heads():
    found = wanted_slots(reading(UNEVEN), model(), 0.25, sinks=16, recent_share=0.3)
    least = (16 + int(0.3 * 0.25 * TOKENS)) / TOKENS
    np.testing.assert_allclose(found[2], least)
    assert found.mean() == pytest.approx(0.25, abs=1e-3)


def test_layers_with_a_window_keep_the_mean():
    found = wanted_slots(reading(UNEVEN), model(windows=(0, 64, 0)), 0.25, **NONE)
    assert found[1].tolist() == [0.25, 0.25] and found[0, 0] > 0.9


def test_groups_are_heads_of_one_class_and_the_sum_is_the_budget():
    (shares,) = calibrated_shares([reading(UNEVEN)], model(), [0.25], "head", **NONE)
    assert [(group.layer, group.heads) for group in shares] == [(0, (0,)), (0, (1,)), (1, (0, 1)), (2, (0, 1))]
    assert [group.share for group in shares] == [2, LEAST, 2, LEAST]
    profile = budget_profile(0.25, 8192, bytes_per_slot=HEADS * LAYERS, groups=shares)
    capacities = {(group.layer, group.heads): group.capacity for group in profile.groups}
    assert capacities[0, (0,)] == capacities[1, (0, 1)] > 3.5 * capacities[2, (0, 1)]
    slots = sum(len(group.heads) * group.capacity for group in profile.groups)
    assert 0.95 * 2048 * LAYERS * HEADS < slots <= 2048 * LAYERS * HEADS


def test_by_layer_heads_stay_together():
    (shares,) = calibrated_shares([reading(UNEVEN)], model(), [0.25], "layer", **NONE)
    assert [group.heads for group in shares] == [(0, 1)] * LAYERS
    assert [group.share for group in shares] == [1, 2, LEAST]


def test_groups_are_the_same_at_every_budget_and_shares_are_not():
    of_budgets = calibrated_shares([reading(UNEVEN)], model(), [0.25, 0.75, 1.0], "head", **NONE)
    assert len({tuple((group.layer, group.heads) for group in shares) for shares in of_budgets}) == 1
    fifth, half, whole = of_budgets
    assert [group.share for group in fifth] != [group.share for group in half]
    assert {group.share for group in whole} == {1.0}
    # What is alike in one budget and not in another is still two capacities.
    assert len(set(symbols(*of_budgets))) == 2


def test_texts_are_averaged():
    other = [heads[::-1] for heads in UNEVEN]
    (shares,) = calibrated_shares([reading(UNEVEN), reading(other, seed=1)], model(), [0.25], "head", **NONE)
    assert [(group.layer, group.heads, group.share) for group in shares[:1]] == [(0, (0, 1), 1.0)]


def test_heads_that_are_alike_at_one_budget_only_are_two_groups():
    """Both have half of their slots in the first budget; the second has room for the other half of one of them."""
    attention = np.ones((LAYERS, HEADS, TOKENS), np.float32)
    attention[0, :, ::2] = 10
    attention[0, 0, 1::2], attention[0, 1, 1::2] = 0, 5
    tight, loose = calibrated_shares([Reading([], [], list(attention))], model(), [1 / 6, 0.25], "head", **NONE)
    assert [(group.layer, group.heads) for group in tight[:2]] == [(0, (0,)), (0, (1,))]
    assert tight[0].share == tight[1].share and loose[0].share < loose[1].share

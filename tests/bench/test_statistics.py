"""Medians, extremes, and which pairs have ratios."""

from __future__ import annotations

from semkv_deploy.bench.statistics import ratio, ratios, spread

from .conftest import cell


def test_a_spread_has_the_median_the_extremes_and_the_order():
    assert spread([3.0, 9.0, 1.0]) == {"median": 3.0, "min": 1.0, "max": 9.0, "all": [3.0, 9.0, 1.0]}
    assert spread([1.0, 2.0])["median"] == 1.5


def test_a_ratio_is_of_what_ran_in_the_same_round():
    """The second round was disturbed and took both thrice as long: the ratio does not show it."""
    assert ratio([8.0, 24.0, 8.0], [4.0, 12.0, 4.0]) == {"median": 2.0, "min": 2.0, "max": 2.0, "all": [2.0] * 3}
    assert ratio([8.0, 8.0], [4.0, 2.0])["all"] == [2.0, 4.0]


def test_budget_1_and_peers_stand_over_each_budget_at_the_same_place():
    cells = [
        cell("budget 1", 1.0, [8.0, 8.0], peak_mib=90.0),
        cell("budget 0.2", 0.2, [2.0, 4.0], peak_mib=9.0),
        cell("llama.cpp f16", None, [6.0, 6.0]),
        cell("budget 0.2", 0.2, [1.0], context=2048),
    ]
    found = {(each["what"], each["over"], each["under"]): each for each in ratios(cells)}
    assert {key for key in found if key[0] == "tpot"} == {
        ("tpot", "budget 1", "budget 0.2"),
        ("tpot", "llama.cpp f16", "budget 0.2"),
        ("tpot", "llama.cpp f16", "budget 1"),
    }
    assert found["tpot", "budget 1", "budget 0.2"]["all"] == [4.0, 2.0]
    assert found["ttft", "llama.cpp f16", "budget 1"]["median"] == 1.0
    assert found["peak memory", "budget 1", "budget 0.2"]["median"] == 10.0
    # A peer's memory beside its weights is not known.
    assert ("peak memory", "llama.cpp f16", "budget 0.2") not in found
    assert all(each["context"] == 1024 for each in found.values())


def test_several_turns_have_a_ratio_of_all_of_them():
    turns = [{"seen": seen, "ttft_s": 1.0, "tpot_ms": 1.0, "live_slots": 1.0} for seen in (512, 1024)]
    cells = [
        cell("budget 1", 1.0, [8.0, 8.0], turns=turns, total_s=12.0),
        cell("budget 0.2", 0.2, [2.0, 4.0], turns=turns, total_s=3.0),
    ]
    found = {each["what"]: each["median"] for each in ratios(cells)}
    assert found == {"tpot": 3.0, "all turns": 4.0}

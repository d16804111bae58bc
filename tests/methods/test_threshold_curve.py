"""The calibration curve and the ladders made of it: every model's keys get thresholds that use the budget."""

from __future__ import annotations

import numpy as np
import pytest

from semkv_deploy.methods.threshold_curve import LEVELS, THRESHOLDS, ThresholdCurve, measure


def curve(kept: list[float]) -> ThresholdCurve:
    return ThresholdCurve(tokens=100, thresholds=THRESHOLDS, kept=(tuple(kept),))


def sloped(middle: float, width: float) -> list[float]:
    """A curve that falls around a distance of `10 ** middle` from 1."""
    distance = np.log10(1 - np.array(THRESHOLDS))
    return [float(share) for share in 0.95 / (1 + np.exp((distance - middle) / width)) + 0.05]


def test_the_curve_reaches_from_everything_kept_to_everything_near_merged():
    assert THRESHOLDS[0] == 1 - 1e-6 and THRESHOLDS[-1] == pytest.approx(0.2)
    assert list(THRESHOLDS) == sorted(set(THRESHOLDS), reverse=True)
    assert len(set(np.array(THRESHOLDS, np.float32))) == len(THRESHOLDS), "graphs have them in float32"


@pytest.mark.parametrize("middle", [-4.5, -3, -1, -0.7])
@pytest.mark.parametrize("share", [0.8, 0.4, 0.15])
def test_the_first_level_keeps_slightly_too_much_and_the_next_ones_little_less(middle: float, share: float):
    """Where keys differ by 3e-5 as where they differ by a third."""
    known = curve(sloped(middle, 0.2))
    ladder = known.ladder(0, share)
    assert len(ladder) == LEVELS and ladder == sorted(ladder, reverse=True) and min(ladder) >= -1
    kept = [known.kept_at(0, threshold) for threshold in ladder[:7]]
    assert 1.0 < kept[0] / share < 1.06
    steps = np.array(kept[1:]) / kept[:-1]
    assert (steps < 1).all() and (steps > 0.88).all()
    assert len(set(np.array(ladder[:7], np.float32))) == 7, "float32 tells them apart"


def test_a_ladder_ends_where_everything_near_merges():
    known = curve([1.0] * len(THRESHOLDS))
    ladder = known.ladder(0, 0.5)
    assert ladder == sorted(ladder, reverse=True) and ladder[-1] == -1
    assert curve(sloped(-1, 0.2)).ladder(0, 0.15)[-1] < 0.2


def test_the_text_is_clustered_only_where_the_curve_falls():
    asked: list[float] = []

    def kept_at(threshold: float) -> float:
        asked.append(threshold)
        return 1.0 if threshold > 0.9995 else 0.1

    kept = measure(kept_at)
    assert kept == tuple(1.0 if threshold > 0.9995 else 0.1 for threshold in THRESHOLDS)
    assert len(asked) == len(set(asked)) < 10


def test_a_curve_never_rises():
    shares = iter(np.random.default_rng(0).random(len(THRESHOLDS)))
    kept = measure(lambda threshold: next(shares))
    assert list(kept) == sorted(kept, reverse=True)

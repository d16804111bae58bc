"""Numbers of one example, and what many of them say."""

from __future__ import annotations

import numpy as np
import pytest

from semkv_deploy.evaluate.metrics import correct, estimate, mean_nll, mean_ranks, paired


def test_leading_tokens_count_up_to_the_first_that_differs():
    logits = np.eye(5, dtype=np.float32)[[1, 2, 3, 4]]
    assert correct(logits, [1, 2, 3, 4]) == 4
    assert correct(logits, [1, 0, 3, 4]) == 1
    assert correct(logits, [0, 2, 3, 4]) == 0


def test_likelihood_is_that_of_the_targets():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32))
    assert mean_nll(logits, [0, 2]) == pytest.approx(-(np.log(0.5) + np.log(0.8)) / 2, abs=1e-6)


def test_interval_covers_the_mean_and_narrows_with_examples():
    values = np.random.default_rng(1).normal(3, 1, 400)
    few, many = estimate(values[:20].tolist()), estimate(values.tolist())
    assert few.low < few.mean < few.high and many.high - many.low < (few.high - few.low) / 2
    # Normal theory: 1.96 standard errors to each side.
    assert (many.high - many.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert estimate([2.0, 2.0, 2.0]) == (2, 2, 2)


def test_pairing_takes_out_what_examples_have_in_common():
    difficulty = np.random.default_rng(2).normal(0, 10, 30)
    better = (difficulty + 1).tolist()
    assert paired(better, difficulty.tolist()) == pytest.approx((1, 1, 1))
    assert estimate(better).high - estimate(better).low > 5


def test_ranks_follow_the_sense_of_each_task_and_share_ties():
    scores = {"kl": {"a": 0.1, "b": 0.2, "c": 0.2}, "recall": {"a": 0.5, "b": 1.0, "c": 0.0}}
    assert mean_ranks(scores, {"kl": False, "recall": True}) == {"a": 1.5, "b": 1.75, "c": 2.75}
    assert mean_ranks({}, {}) == {}


def test_only_methods_that_every_task_has_are_ranked():
    assert mean_ranks({"x": {"a": 1, "b": 2}, "y": {"a": 1}}, {"x": True, "y": True}) == {"a": 1.0}

from __future__ import annotations

import numpy as np
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.sampling import Sampler

LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))


def test_greedy_takes_the_largest_and_the_lowest_of_equals():
    assert Sampler()(LOGITS).tolist() == [0]
    assert Sampler()(np.zeros((2, 4), np.float32)).tolist() == [0, 0]


def test_nucleus_is_the_smallest_set_that_reaches_top_p():
    sampler = Sampler(temperature=1.0, top_p=0.75)
    assert {int(sampler(LOGITS)[0]) for _ in range(300)} == {0, 1}


def test_draws_follow_the_distribution_and_the_seed():
    first, second = Sampler(temperature=1.0, seed=3), Sampler(temperature=1.0, seed=3)
    draws = [int(first(LOGITS)[0]) for _ in range(2000)]
    assert draws == [int(second(LOGITS)[0]) for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 2000, np.exp(LOGITS[0]), atol=0.04)


def test_top_k_draws_from_the_likeliest():
    sampler = Sampler(temperature=5.0, top_k=2)
    assert {int(sampler(LOGITS)[0]) for _ in range(300)} == {0, 1}
    assert {int(Sampler(temperature=5.0, top_k=99)(LOGITS)[0])} <= {0, 1, 2, 3}


def test_top_p_is_of_what_top_k_left():
    """Of 0.5 and 0.3 the first is 0.625."""
    sampler = Sampler(temperature=1.0, top_p=0.6, top_k=2)
    assert {int(sampler(LOGITS)[0]) for _ in range(200)} == {0}


def test_a_temperature_near_zero_is_greedy():
    assert {int(Sampler(temperature=5e-324, seed=seed)(LOGITS)[0]) for seed in range(20)} == {0}


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_out_of_range(arguments: dict[str, float]):
    with pytest.raises(SemkvError, match="out of range"):
        Sampler(**arguments)

"""Merging what is dropped: exact where keys are the same, and never between what different queries look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Importance, method_from_options
from semkv_deploy.methods.merging import merge_dropped

from .test_compressors import example, facts, reference, run

DIM = 8
MERGING = Importance(fit="merge", sinks=0)


def merged(
    key: torch.Tensor, value: torch.Tensor, weight: list[float], keep: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[kept,D]` and biases `[kept]` of what stays of a cache of one head."""
    before = {"key_cache": key[None, None], "value_cache": value[None, None], "length": torch.tensor([len(key)])}
    after = {name: before[name][:, :, keep].clone() for name in ("key_cache", "value_cache")}
    after |= {"slot_bias": torch.zeros(1, 1, len(keep)), "length": torch.tensor([len(keep)])}
    merge_dropped(before, after, torch.tensor([[keep]]), torch.tensor([[weight]]).log())
    return after["value_cache"][0, 0], after["slot_bias"][0, 0]


def test_twins_attend_as_before():
    """Every key is there twice: half of the slots give every query what all of them gave."""
    key, value = torch.randn(6, DIM), torch.randn(12, DIM)
    query = torch.randn(20, DIM)
    kept, bias = merged(key.repeat(2, 1), value, [0.3] * 12, list(range(6)))
    expected = (query @ key.repeat(2, 1).T).softmax(-1) @ value
    torch.testing.assert_close((query @ key.T + bias).softmax(-1) @ kept, expected)


def test_the_heavier_value_counts_more():
    key = torch.ones(2, DIM)
    kept, bias = merged(key, torch.tensor([[0.0] * DIM, [1.0] * DIM]), [0.3, 0.1], [0])
    torch.testing.assert_close(kept, torch.full((1, DIM), 0.25))
    torch.testing.assert_close(bias, torch.tensor([4 / 3]).log())


def test_nothing_counts_more_than_what_it_is_merged_into():
    key = torch.ones(2, DIM)
    kept, bias = merged(key, torch.tensor([[0.0] * DIM, [1.0] * DIM]), [0.01, 0.9], [0])
    torch.testing.assert_close(kept, torch.full((1, DIM), 0.5))
    torch.testing.assert_close(bias, torch.tensor([2.0]).log())


def test_what_is_like_nothing_that_stays_is_gone():
    key = torch.eye(DIM)[:2]
    value = torch.randn(2, DIM)
    kept, bias = merged(key, value, [0.5, 0.5], [0])
    torch.testing.assert_close(kept, value[:1])
    assert bias.tolist() == [0]


def test_nothing_is_merged_in_a_layer_with_a_window():
    """Its oldest slots are no longer looked at, whatever they are like."""
    import onnxruntime as ort

    state = example(MERGING, batch=1)
    session = ort.InferenceSession(MERGING.compressor(facts()).SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {
        **state,
        "thresholds": np.zeros(0, np.float32),
        "target": np.array([40]),
        "recent": np.array([8]),
        "sinks": np.array(0),
        "scored": np.array(0, np.float32),
    }
    names = [value.name for value in session.get_outputs()]
    inputs = [value.name for value in session.get_inputs()]
    result = dict(zip(names, session.run(None, {name: feed[name] for name in inputs}), strict=True))
    count = int(state["length"][0])
    for name in ("value_cache", "slot_bias"):
        np.testing.assert_array_equal(
            result[f"{name}_out"][0, :, :40], state[name][0, :, count - 40 : count], err_msg=name
        )


def test_rows_that_drop_nothing_are_as_they_were():
    state = example(MERGING, batch=3)
    for each in (run, reference):
        result = each(MERGING, state, [], [40, 10_000, 10_000], [8, 8, 8])
        assert result["evicted"].tolist()[1:] == [0, 0]
        for name in ("value_cache", "slot_bias"):
            live = state["length"]
            for row in (1, 2):
                np.testing.assert_array_equal(result[name][row, :, : live[row]], state[name][row, :, : live[row]])
            assert (result[name][0, :, :40] != state[name][0, :, :40]).any()


def test_merging_takes_predictions_and_a_fit_does_not():
    assert method_from_options("importance", {"queries": "predicted", "fit": "merge"}).bias_mode == "head"
    with pytest.raises(SemkvError, match="fit=all needs queries=repeat"):
        method_from_options("importance", {"queries": "predicted", "fit": "all"})

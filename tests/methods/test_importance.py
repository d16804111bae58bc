"""Selection by importance: what is kept, and that weights fitted on readings predict what was read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from semkv_deploy.budget import budget_profile
from semkv_deploy.methods import DynSplit, Importance, StreamingLLM
from semkv_deploy.methods.calibration import CalibrationText, Reading
from semkv_deploy.methods.importance_prediction import ScoreWeights, feature_count, fit
from semkv_deploy.model.cache_groups import CacheGroup, one_a_head, one_a_layer

from .test_compressors import CAPACITY, DIM, HEADS, example, facts, run, score_weights


def kept_positions(result: dict[str, np.ndarray], head: int) -> list[int]:
    return (result["slot_position"][0, head, : result["length"][0]] // 3).tolist()


def test_each_head_keeps_sinks_window_and_its_highest_scores():
    """Position 0 features: a key rotated back by hand, so that the score of every slot is known."""
    state = example(Importance(queries="predicted"), batch=1)
    # Every slot at position 0 has the key that it would be rotated back to.
    positions = state["slot_position"].copy()
    state["slot_position"][:] = 0
    features = np.concatenate([state["key_cache"][0], state["value_cache"][0]], -1)
    features = np.concatenate([features, features**2], -1)
    table = score_weights().reshape(HEADS, -1)
    score = np.einsum("hcf,hf->hc", features, table[:, :-1]) + table[:, -1:]
    state["slot_chunk"] = positions
    result = run(Importance(queries="predicted"), state, [], [50], [10])
    assert result["length"].tolist() == [50] and result["evicted"].tolist() == [CAPACITY - 50]
    kept = [(result["slot_chunk"][0, head, :50] // 3).tolist() for head in range(HEADS)]
    for head in range(HEADS):
        middle = np.argsort(score[head, 4 : CAPACITY - 10])[::-1][: 50 - 14] + 4
        assert kept[head] == [*range(4), *sorted(middle.tolist()), *range(CAPACITY - 10, CAPACITY)]
    assert kept[0] != kept[1]


def test_a_key_counts_the_same_wherever_it_stands():
    """Rotating all keys by as many positions as their slots' positions grow changes nothing in what is kept."""
    import torch

    state = example(Importance(queries="predicted"), batch=1)
    moved = {name: array.copy() for name, array in state.items()}
    rotary = facts().rotary
    assert rotary is not None
    turned = rotary.rotate(torch.from_numpy(state["key_cache"]), torch.full((1, HEADS, CAPACITY), 700))
    moved["key_cache"], moved["slot_position"] = turned.numpy(), state["slot_position"] + 700
    first, second = (run(Importance(queries="predicted"), each, [], [40], [8]) for each in (state, moved))
    np.testing.assert_array_equal(second["slot_position"][0, :, :40] - 700, first["slot_position"][0, :, :40])


@pytest.mark.parametrize("case", ["uncalibrated", "window"])
def test_without_scores_the_newest_slots_stay(case: str):
    """In a layer with a sliding window only its oldest slots may go."""
    model = facts(windows=(64 if case == "window" else 0,))
    profile = budget_profile(0.5, 2 * CAPACITY, bytes_per_slot=1, groups=one_a_layer(1, HEADS))
    settings = ScoreWeights(weights=(tuple(score_weights().tolist()),), correlation=None) if case == "window" else None
    given = Importance(queries="predicted").group_inputs(model, profile, settings)
    assert set(given["weights"][0]) == {0.0} and given["sinks"] == ((0,) if case == "window" else (4,))
    import onnxruntime as ort

    state = example(Importance(queries="predicted"), batch=1)
    found = []
    for method in (Importance(queries="predicted"), StreamingLLM()):
        if isinstance(method, StreamingLLM):
            state = {**state, **{name: state[name][:, :1] for name in ("slot_position", "slot_chunk")}}
        session = ort.InferenceSession(method.compressor(model).SerializeToString(), providers=["CPUExecutionProvider"])
        feeds: dict[str, Any] = {
            **state,
            "target": np.array([60]),
            "recent": np.array([15]),
            "sinks": np.array(given["sinks"][0]),
            "weights": np.array(given["weights"][0], np.float32),
        }
        names = [value.name for value in session.get_outputs()]
        feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
        found.append(dict(zip(names, session.run(names, feeds), strict=True)))
    for name in ("key_cache_out", "value_cache_out", "length_out"):
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)


def reading(seed: int, tokens: int = 300) -> Reading:
    """Two layers whose attention is a function of keys and values, each head its own."""
    import torch

    random = np.random.default_rng(seed)
    shape = (2, HEADS, tokens, DIM)
    key, value = random.standard_normal(shape), random.standard_normal(shape)
    log = key[..., 0] - 0.7 * value[..., 3] + 0.5 * key[..., 1] ** 2 - 6
    log[:, 1] = -2 * key[:, 1, :, 2] - 6
    rotary = facts().rotary
    assert rotary is not None
    cached = rotary.rotate(torch.from_numpy(key), torch.arange(tokens).expand(2, HEADS, tokens)).numpy()
    return Reading(list(cached), list(value), list(np.exp(log).astype(np.float32)))


def text(readings: list[Reading], groups: tuple[CacheGroup, ...]) -> CalibrationText:
    def unused(*_: Any) -> Any:
        raise AssertionError("reads no buffer and runs no graph")

    return CalibrationText(np.zeros(1, np.int64), groups, unused, unused, lambda share: None, readings)


def test_calibration_finds_what_attention_depends_on():
    model = facts(layers=2, windows=(0, 0))
    groups = budget_profile(0.5, 1024, bytes_per_slot=1, groups=one_a_head(2, HEADS)).groups
    settings = Importance(queries="predicted").calibrate(model, text([reading(0), reading(1), reading(2)], groups))
    assert settings.correlation is not None and settings.correlation > 0.97
    assert len(settings.weights) == 4 and {len(row) for row in settings.weights} == {feature_count(model) + 1}
    # Head 0 looks at channel 0 of the key, head 1 at channel 2 with the other sign.
    first, second = settings.weights[:2]
    assert first[0] == pytest.approx(1, abs=0.05) and first[DIM + 3] == pytest.approx(-0.7, abs=0.05)
    assert second[2] == pytest.approx(-2, abs=0.1) and abs(second[0]) < 0.05
    together = budget_profile(0.5, 1024, bytes_per_slot=1, groups=one_a_layer(2, HEADS)).groups
    joined = Importance(queries="predicted").calibrate(model, text([reading(0), reading(1), reading(2)], together))
    assert joined.weights[0] == first + second
    assert Importance(queries="predicted").calibrate(model, text([reading(0)], groups)).correlation is None


def test_a_feature_that_never_varies_has_no_say():
    random = np.random.default_rng(0)
    x = random.standard_normal((50, 3))
    x[:, 1] = 7
    weights = fit([x], [x[:, 0] + 1])
    assert np.isfinite(weights).all() and abs(weights[1]) < 1e-6
    np.testing.assert_allclose(x @ weights[:3] + weights[3], x[:, 0] + 1, atol=0.1)


def test_what_is_best_is_taken_where_it_can_be_had():
    """What a build makes of the defaults: for targets, then for the model."""

    def resolved(method: Importance, *, records: bool = True, capped: bool = False) -> tuple[str, str, str]:
        found = method.for_build(records=records, capped=capped)
        return found.queries, found.fit, found.budget_by

    assert resolved(Importance()) == ("repeat", "all", "head")
    assert resolved(Importance(), capped=True) == ("repeat", "none", "head")
    assert resolved(Importance(), records=False) == ("predicted", "merge", "layer")
    assert resolved(Importance(queries="predicted")) == ("predicted", "merge", "layer")
    assert resolved(Importance(queries="predicted", fit="none")) == ("predicted", "none", "layer")
    assert resolved(Importance(fit="bias"), records=False) == ("repeat", "bias", "head"), "refused with its name later"
    assert resolved(DynSplit()) == ("repeat", "none", "uniform")

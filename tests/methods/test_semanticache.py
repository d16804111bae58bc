"""SemantiCache's options: what each changes, and that a budget is used on models whose keys are all alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.budget import budget_profile
from semkv_deploy.methods import SemantiCache
from semkv_deploy.methods.calibration import CalibrationText
from semkv_deploy.methods.threshold_curve import THRESHOLDS, ThresholdCurve
from semkv_deploy.model.cache_groups import one_a_layer
from semkv_deploy.model.delimiters import ChunkCounter

from .test_compressors import CAPACITY, HEADS, example, facts, ladder, run

TARGET, RECENT = 80, 20


def live(result: Any, name: str) -> Any:
    """The live slots of the first row."""
    return result[name][0, :, : result["length"][0]]


def test_the_papers_form_is_one_preset_and_what_is_given_wins():
    paper = SemantiCache(form="paper")
    assert paper.thresholds() == [0.7] and paper.ladder_levels == 1
    assert (paper.sinks, paper.recent, paper.delimiters, paper.neighbours) == (0, 0, "keep", 1)
    assert (paper.merge_keys, paper.merge, paper.center) == ("cached", "keys_and_values", False)
    changed = SemantiCache(form="paper", sinks=4, threshold=0.8)
    assert changed.sinks == 4 and changed.thresholds() == [0.8] and changed.delimiters == "keep"
    assert SemantiCache.model_validate(changed.model_dump()) == changed
    one_level = SemantiCache(ladder="paper")
    assert (one_level.delimiters, one_level.neighbours, one_level.sinks) == ("keep", 1, 4)


@pytest.mark.parametrize("merge_keys", ["cached", "unrotated"])
def test_with_values_only_a_core_has_its_seeds_key_and_the_mean_value(merge_keys: Any):
    method = SemantiCache(merge="values", merge_keys=merge_keys)
    state = example(method, batch=1)
    result = run(method, state, ladder(method), [TARGET], [RECENT])
    seeds = live(result, "slot_position")[0] // 3  # positions are three times the slots
    np.testing.assert_array_equal(live(result, "key_cache"), state["key_cache"][0][:, seeds])
    weight = np.exp(state["slot_bias"][0])[..., None] * state["value_cache"][0]
    merged = np.exp(live(result, "slot_bias"))[..., None] * live(result, "value_cache")
    np.testing.assert_allclose(merged.sum(1), weight.sum(1), rtol=1e-3, atol=1e-3)
    assert (live(result, "slot_bias") > state["slot_bias"][0][:, seeds] + 0.1).any(), "something merged"


def test_centered_keys_are_compared_without_what_they_have_in_common():
    """A direction added to every key changes no cluster, where it would hide every difference otherwise."""
    centered, plain = (SemantiCache(center=center, merge_keys="cached", sinks=0) for center in (True, False))
    state = example(centered, batch=1)
    shift = 50 * np.random.default_rng(1).standard_normal((1, HEADS, 1, state["key_cache"].shape[-1]))
    shifted = {**state, "key_cache": (state["key_cache"] + shift).astype(np.float32)}
    one, other = (run(centered, given, ladder(centered), [TARGET], [RECENT]) for given in (state, shifted))
    np.testing.assert_array_equal(one["slot_position"], other["slot_position"])
    np.testing.assert_allclose(live(other, "key_cache"), live(one, "key_cache") + shift[0], atol=1e-3)
    hidden = run(plain, shifted, ladder(plain), [TARGET], [RECENT])
    assert hidden["level"] == 0 and hidden["length"] < one["length"] / 2


def test_delimiters_apart_merge_with_delimiters_only():
    method = SemantiCache(delimiters="apart", sinks=0, recent=0)
    state = example(method, batch=1)
    # Every fourth delimiter is the same token.
    state["key_cache"][0, :, 8::9] = state["key_cache"][0, :, 8:9]
    state["slot_position"][:] = 0
    result = run(method, state, [0.9], [CAPACITY - 1], [0])
    is_delimiter = live(result, "slot_chunk")[0] % 2 == 1
    weights = np.exp(live(result, "slot_bias")[0])
    before = np.exp(state["slot_bias"][0, 0])
    np.testing.assert_allclose(weights[is_delimiter].sum(), before[8::9].sum(), rtol=1e-5)
    assert is_delimiter.sum() < len(before[8::9]), "repeated delimiters became fewer"


def profile(budget: float = 0.5) -> Any:
    return budget_profile(budget, 1024, bytes_per_slot=1, groups=one_a_layer(2, HEADS))


def test_a_layer_that_merges_more_than_twice_what_is_asked_is_named():
    model = facts(layers=2, windows=(0, 0))
    steep = tuple(0.02 for _ in THRESHOLDS)
    gentle = tuple(np.linspace(1, 0.05, len(THRESHOLDS)).tolist())
    curve = ThresholdCurve(tokens=64, thresholds=THRESHOLDS, kept=(gentle, steep))
    (warning,) = SemantiCache().warnings(model, profile(), curve)
    assert "budget 0.5" in warning and "layers 1 keep less than half" in warning
    assert SemantiCache().warnings(model, profile(), curve.model_copy(update={"kept": (gentle, gentle)})) == []
    assert SemantiCache().warnings(facts(layers=2, windows=(0, 40)), profile(), curve) == [], "nothing merges there"
    assert SemantiCache().warnings(model, profile(1.0), curve) == []


def biased_keys(tokens: list[int]) -> list[tuple[Any, Any]]:
    """Keys and values, by layer, of a random Qwen2 whose key biases give all keys of a layer one direction."""
    import torch
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        initializer_range=0.3,
    )
    model = Qwen2Model(config).eval()
    with torch.no_grad():
        for layer, size in zip(model.layers, (30.0, 300.0), strict=True):
            # In the slowest channels, which rotation leaves as they are.
            layer.self_attn.k_proj.bias.view(HEADS, 16)[:, 7] = size
        cache = model(input_ids=torch.tensor([tokens]), use_cache=True).past_key_values
    return [(layer.keys.numpy(), layer.values.numpy()) for layer in cache.layers]


def mean_cosine(keys: Any) -> float:
    """Of all pairs of a layer's keys `[1,H,n,D]`, averaged over the heads."""
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    return float((unit.mean(2) ** 2).sum(-1).mean())


def calibrated(method: SemantiCache, model: Any, tokens: list[int], chunk: Any) -> Any:
    """What the method makes of a text that the model has read."""
    import onnxruntime as ort

    capacity = -(-len(tokens) // 64) * 64
    layers = [
        [np.pad(array, ((0, 0), (0, 0), (0, capacity - len(tokens)), (0, 0))) for array in layer]
        for layer in biased_keys(tokens)
    ]
    sessions: dict[int, Any] = {}

    def run_graph(graph: Any, feeds: Any) -> Any:
        if id(graph) not in sessions:
            sessions[id(graph)] = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        given = {value.name: feeds[value.name] for value in sessions[id(graph)].get_inputs()}
        return {"length_out": sessions[id(graph)].run(["length_out"], given)[0]}

    groups = budget_profile(1.0, capacity, bytes_per_slot=1, groups=one_a_layer(2, HEADS)).groups
    read = lambda buffer, group: layers[group][buffer == "value"]  # noqa: E731
    return method.calibrate(model, CalibrationText(chunk, groups, read, run_graph, lambda share: None))


def test_a_model_with_large_key_biases_uses_its_budget():
    """Each compression of a full layer leaves nine tenths of the slots filled that may stay, and no more than all."""
    from semkv_deploy.compiler.calibrate import calibration_text
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    texts = [tokenizer.encode(text, add_special_tokens=False)[:448] for text in (calibration_text(), readme)]
    stops = set(tokenizer.encode(". , : ; \n", add_special_tokens=False))
    chunks = [ChunkCounter().count(np.array([token in stops for token in text])) for text in texts]
    model, method = facts(layers=2, windows=(0, 0)), SemantiCache()
    settings = calibrated(method, model, texts[0], chunks[0])
    given = budget_profile(0.5, 512, bytes_per_slot=1, groups=one_a_layer(2, HEADS))
    assert method.warnings(model, given, settings) == []
    filled = []
    for number, (group, (keys, values)) in enumerate(zip(given.groups, biased_keys(texts[1]), strict=True)):
        assert mean_cosine(keys) > (0.9, 0.99)[number]
        ladder = method.group_inputs(model, given, settings)["thresholds"][number]
        state = empty_state(group.capacity)
        for start in range(0, len(texts[1]), given.prefill_chunk):
            piece = slice(start, start + given.prefill_chunk)
            count = len(texts[1][piece])
            if state["length"][0] + count > group.capacity:
                recent = method.recent_slots(group.keep_slots)
                after = run(method, state, list(ladder), [group.keep_slots], [recent])
                state = {name: after[name] for name in state}
                assert after["evicted"][0] == 0 and state["length"][0] <= group.keep_slots
                filled.append(state["length"][0] / group.keep_slots)
            slots = slice(int(state["length"][0]), int(state["length"][0]) + count)
            state["key_cache"][:, :, slots], state["value_cache"][:, :, slots] = keys[:, :, piece], values[:, :, piece]
            state["slot_position"][:, :, slots] = np.arange(start, start + count)
            state["slot_chunk"][:, :, slots] = chunks[1][piece]
            state["length"] = state["length"] + count
    assert len(filled) >= 6 and min(filled) >= 0.9, filled


def empty_state(capacity: int) -> dict[str, Any]:
    """A group's state before anything was appended."""
    cache = (1, HEADS, capacity, 16)
    return {
        "key_cache": np.zeros(cache, np.float32),
        "value_cache": np.zeros(cache, np.float32),
        "slot_bias": np.zeros(cache[:3], np.float32),
        "length": np.zeros(1, np.int64),
        "slot_position": np.zeros((1, 1, capacity), np.int64),
        "slot_chunk": np.zeros((1, 1, capacity), np.int64),
    }

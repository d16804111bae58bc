"""Compressor graphs in ONNX Runtime against the methods' PyTorch statements: caches, biases, metadata, level."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from semkv_deploy.budget import budget_profile
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Full, SemantiCache, method_from_options
from semkv_deploy.methods.attention_matching import QUERIES
from semkv_deploy.methods.base import STATE, Method
from semkv_deploy.methods.importance_prediction import feature_count
from semkv_deploy.methods.layout import COMPRESS
from semkv_deploy.model.cache_groups import one_a_layer
from semkv_deploy.model.config import ModelFacts, Rotary

from .matrix import COMPRESSING

HEADS, CAPACITY, DIM = 2, 128, 16


def facts(**changes: Any) -> ModelFacts:
    rotary = Rotary(
        inv_freq=tuple(10_000.0 ** -(np.arange(0, DIM, 2) / DIM)), attention_scaling=1.0, dim=DIM, interleaved=False
    )
    given: dict[str, Any] = {
        "family": "test",
        "source": "test",
        "layers": 1,
        "query_heads": 4,
        "kv_heads": HEADS,
        "head_dim": DIM,
        "hidden_size": 64,
        "vocab_size": 10,
        "max_position": 1024,
        "dtype": "float32",
        "eos_token_ids": (0,),
        "windows": (0,),
        "rotary": rotary,
        "versions": {},
    }
    return ModelFacts(**{**given, **changes})


def example(method: Method, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Ragged rows of keys in a few directions, chunks of 9 tokens that end in a delimiter, some slots merged before."""
    random = np.random.default_rng(seed)
    groups = method.cluster_groups(HEADS)
    directions = random.standard_normal((5, DIM))
    chosen = random.integers(0, 5, (batch, HEADS, CAPACITY))
    key = directions[chosen] + 0.35 * random.standard_normal((batch, HEADS, CAPACITY, DIM))
    sizes = np.log(random.integers(1, 4, (batch, groups, CAPACITY)))
    length = np.array([CAPACITY - 7 * row for row in range(batch)], np.int64)
    slot = np.arange(CAPACITY)
    sizes[np.broadcast_to(slot, sizes.shape) >= length[:, None, None]] = 0
    chunk = 2 * (slot // 9) + (slot % 9 == 8)
    # Some attention is below the least that counts, so that there are ties.
    attention = np.exp(random.uniform(-16, 0, (batch, HEADS, CAPACITY))).astype(np.float32)
    # The first row has no queries yet, the others some.
    queries = random.standard_normal((batch, HEADS, QUERIES, DIM)).astype(np.float32) / 4
    queries[0] = 0
    queries[:, :, : QUERIES // 3] = 0
    return {
        "key_cache": key.astype(np.float32),
        "value_cache": random.standard_normal(key.shape).astype(np.float32),
        "slot_bias": np.broadcast_to(sizes, (batch, HEADS, CAPACITY)).astype(np.float32).copy(),
        "length": length,
        "slot_position": np.broadcast_to(3 * slot, (batch, groups, CAPACITY)).astype(np.int64).copy(),
        "slot_chunk": np.broadcast_to(chunk, (batch, groups, CAPACITY)).astype(np.int64).copy(),
        **({"slot_attention": attention} if method.reads_again else {}),
        **({"reference_queries": queries} if method.fitted_queries else {}),
        **{name: _blocks(random, (batch, groups, CAPACITY)) for name in method.more_columns},
    }


def _blocks(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of blocks of 1 to 20 slots, each head its own; some numbers are missing."""
    begins = random.random(shape) < 0.2
    begins[..., ::20] = True
    return np.cumsum(begins * random.integers(1, 4, shape), -1)


def score_weights() -> np.ndarray:
    """Weights under which scores are some nats apart, for a method that has scores."""
    return np.random.default_rng(5).standard_normal(HEADS * (feature_count(facts()) + 1)).astype(np.float32) / 4


def run(
    method: Method,
    state: dict[str, np.ndarray],
    thresholds: list[float],
    target: list[int],
    recent: list[int],
    graph: onnx.ModelProto | None = None,
) -> Any:
    """The outputs by name, without `_out`, of the method's graph or of another form of it."""
    import onnxruntime as ort

    graph = graph or method.compressor(facts())
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {
        **state,
        "thresholds": np.array(thresholds, np.float32),
        "target": np.array(target, np.int64),
        "recent": np.array(recent, np.int64),
        "sinks": np.array(method.sinks, np.int64),
        "weights": score_weights(),
        "scored": np.array(1, np.float32),
    }
    outputs = session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})
    names = [value.name.removesuffix("_out") for value in session.get_outputs()]
    return dict(zip(names, outputs, strict=True))


def reference(
    method: Method, state: dict[str, np.ndarray], thresholds: list[float], target: list[int], recent: list[int]
) -> Any:
    import torch

    result = method.reference(COMPRESS)(
        facts(),
        {name: torch.from_numpy(array) for name, array in state.items()},
        target=torch.tensor(target),
        sinks=method.sinks,
        recent=torch.tensor(recent),
        thresholds=thresholds,
        **({"weights": torch.from_numpy(score_weights())} if method.scores else {}),
    )
    return {name: tensor.numpy() for name, tensor in result.items()}


@pytest.mark.parametrize("method", COMPRESSING.values(), ids=COMPRESSING)
@pytest.mark.parametrize("keep", [0.75, 0.3], ids=["loose", "tight"])
def test_graph_matches_the_reference(method: Method, keep: float):
    state = example(method, batch=3)
    # The third row is far below its target: nothing may change in it.
    target = [int(keep * CAPACITY), int(keep * CAPACITY) - 5, CAPACITY]
    recent = [method.recent_slots(slots) for slots in target]
    thresholds = ladder(method)
    ours, expected = (each(method, state, thresholds, target, recent) for each in (run, reference))
    for name in ("length", "level", "evicted", "slot_position", "slot_chunk", *method.more_columns):
        np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)
    for name in ("key_cache", "value_cache", "slot_bias"):
        if method.fitted_queries and name != "key_cache":
            # Solved for in steps, which carry rounding along; what is solved for is how often a slot counts.
            counts = np.exp if name == "slot_bias" else np.asarray
            np.testing.assert_allclose(counts(ours[name]), counts(expected[name]), 2e-3, 2e-3, err_msg=name)
            continue
        np.testing.assert_allclose(ours[name], expected[name], atol=2e-5, err_msg=name)
    assert (ours["length"] <= target).all()
    assert ours["level"][2] == -1
    for name in STATE:
        np.testing.assert_array_equal(ours[name][2], state[name][2] * _live(name, state["length"][2]), err_msg=name)


def _live(name: str, length: int) -> Any:
    """1 for what a copied row keeps of a state tensor, 0 for what is cleared (slots past the length)."""
    if name == "length":
        return 1
    live = np.arange(CAPACITY) < length
    return live[:, None] if name.endswith("cache") else live


@pytest.mark.parametrize("method", [SemantiCache(), SemantiCache(sinks=0)], ids=["sinks", "no sinks"])
def test_sinks_and_window_are_untouched_bit_for_bit(method: SemantiCache):
    state = example(method, batch=1)
    length, target = int(state["length"][0]), 70
    recent = method.recent_slots(target)
    result = run(method, state, ladder(method), [target], [recent])
    kept = int(result["length"][0])
    for name in ("key_cache", "value_cache", "slot_bias"):
        before, after = state[name][0], result[name][0]
        np.testing.assert_array_equal(after[:, : method.sinks], before[:, : method.sinks])
        np.testing.assert_array_equal(after[:, kept - recent : kept], before[:, length - recent : length])


@pytest.mark.parametrize("merge_keys", ["cached", "unrotated"])
def test_a_threshold_of_one_changes_nothing_but_what_is_evicted(merge_keys: Any):
    """No cosine exceeds 1 by more than rounding, so that every slot stays itself; the rest is the eviction rule."""
    method = SemantiCache(merge_keys=merge_keys, threshold=1.0, ladder="paper", sinks=4)
    state = example(method, batch=1)
    result = run(method, state, [1.0 + 1e-6], [100], [0])
    kept = [*range(4), *range(32, CAPACITY)]
    for name in ("key_cache", "value_cache", "slot_bias"):
        np.testing.assert_array_equal(result[name][0, :, :100], state[name][0][:, kept])
    assert result["evicted"].tolist() == [28] and result["length"].tolist() == [100]


ISOLATING = {name: method for name, method in COMPRESSING.items() if getattr(method, "isolates", False)}


@pytest.mark.parametrize("method", ISOLATING.values(), ids=ISOLATING)
@pytest.mark.parametrize("sinks", [4, 60])
def test_where_turns_are_isolated_sinks_are_untouched_bit_for_bit(method: Method, sinks: int):
    """Nothing is merged into them and nothing fitted: they are what older turns kept. What follows is fitted."""
    method = method.model_copy(update={"sinks": sinks})
    state = example(method, batch=3)
    targets = [sinks + 12, CAPACITY, sinks + 30]
    result = run(method, state, ladder(method), targets, [6, 0, 15])
    for name in ("key_cache", "value_cache", "slot_bias"):
        np.testing.assert_array_equal(result[name][:, :, :sinks], state[name][:, :, :sinks])
    assert (result["length"] <= targets).all() and result["level"].tolist()[1] == -1
    if method.fitted_queries:
        # Row 1 was copied: another run may be its own. The others' queries are used up.
        np.testing.assert_array_equal(result["reference_queries"][1], state["reference_queries"][1])
        assert not result["reference_queries"][[0, 2]].any() and state["reference_queries"][[1, 2]].any((1, 2, 3)).all()


def test_merged_slots_keep_their_weight():
    """The number of tokens that slots stand for does not change: sum over slots of exp(bias)."""
    method = SemantiCache()
    state = example(method, batch=1)
    result = run(method, state, ladder(method), [80], [20])
    assert result["evicted"][0] == 0 and result["length"][0] <= 80
    before = np.exp(state["slot_bias"][0, 0]).sum()
    after = np.exp(result["slot_bias"][0, 0, : result["length"][0]]).sum()
    np.testing.assert_allclose(after, before, rtol=1e-5)


def test_paper_form_keeps_delimiters_apart():
    method = SemantiCache(ladder="paper", sinks=0, recent=0, threshold=0.5, merge_keys="cached")
    state = example(method, batch=1)
    result = run(method, state, [0.5], [CAPACITY - 1], [0])
    assert result["evicted"][0] == 0 and result["length"][0] < CAPACITY - CAPACITY // 9
    chunks = result["slot_chunk"][0, 0, : result["length"][0]]
    delimiters = np.flatnonzero(chunks % 2)
    assert len(delimiters) == CAPACITY // 9
    positions = result["slot_position"][0, 0, delimiters] // 3
    for name in ("key_cache", "value_cache", "slot_bias"):
        np.testing.assert_array_equal(result[name][0, :, delimiters], state[name][0, :, positions])


@pytest.mark.parametrize("method", COMPRESSING.values(), ids=COMPRESSING)
def test_no_shape_depends_on_data(method: Method):
    """No operator whose output size is read off its input's values."""
    graph = method.compressor(facts())
    nodes = [*graph.graph.node, *(node for function in graph.functions for node in function.node)]
    assert not {"NonZero", "Compress", "Unique", "NonMaxSuppression"} & {node.op_type for node in nodes}


def ladder(method: Method) -> list[float]:
    return method.model_copy(update={"threshold": 0.91}).thresholds() if isinstance(method, SemantiCache) else []


def test_full_never_compresses():
    layout = Full().layout(facts(), budget_profile(0.5, 512, bytes_per_slot=1, groups=one_a_layer(1, HEADS)).groups)
    assert Full().programs(facts(), layout) == []
    with pytest.raises(NotImplementedError, match="full keeps every token"):
        Full().compressor(facts())
    with pytest.raises(KeyError):
        Full().reference(COMPRESS)


def test_unrotated_needs_a_rotary_table():
    with pytest.raises(SemkvError, match=r"cannot be un-rotated.*merge_keys=cached"):
        SemantiCache(merge_keys="unrotated").compressor(facts(rotary=None))


def test_keys_are_merged_as_cached_where_they_cannot_be_unrotated():
    assert SemantiCache().resolve(facts()).merge_keys == "unrotated"
    assert SemantiCache().resolve(facts(rotary=None)).merge_keys == "cached"
    assert SemantiCache().compressor(facts(rotary=None)) == SemantiCache(merge_keys="cached").compressor(facts())


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("lru", {}, "unknown method"),
        ("semanticache", {"recent": 2}, "does not take recent"),
        ("streaming-llm", {"span": 64}, "does not take span"),
    ],
)
def test_bad_options(kind: str, options: dict[str, Any], words: str):
    with pytest.raises(SemkvError, match=words):
        method_from_options(kind, options)

"""SemanticCluster: all implementations against each other, Algorithm 1 as published, and what merging must preserve."""

from __future__ import annotations

import math
from typing import Any

import onnx
import onnx.helper
import onnx.inliner
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import nexus_attention, semantic_cluster
from semkv_deploy.ops.spec import make_node

from .conftest import STATIC_CLUSTER, Implementation, assert_agree, build_model, implementations, open_session

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
reference: Implementation = semantic_cluster.reference
ALL = sorted(implementations(semantic_cluster))
MARGIN = 1e-5
"""No deciding cosine may lie closer to its threshold: float32 sums differ in the last bits."""


def make_inputs(
    heads: int = 2,
    groups: int = 1,
    levels: int = 3,
    capacity: int = 32,
    size: int = 4,
    lengths: tuple[int, ...] = (32, 20, 9),
    targets: tuple[int, ...] = (16, 8, 16),
    dtype: torch.dtype = torch.float32,
    weighted: bool = True,
    thresholds: tuple[float, ...] = (0.95, 0.8, 0.3),
    step: float = 0.4,
    seed: int = 0,
) -> list[Tensor]:
    """Keys that drift slowly, so neighbours are similar; chunks of a few slots, with negatives between."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    walk = torch.randn(batch, heads, capacity, size, generator=generator).mul(step).cumsum(2)
    keys = (walk + torch.randn(batch, heads, 1, size, generator=generator)).to(dtype)
    values = torch.randn(batch, heads, capacity, size, generator=generator).to(dtype)
    bias = torch.zeros(batch, groups, capacity)
    if weighted:
        bias = torch.randint(1, 5, (batch, groups, capacity), generator=generator).float().log()
        bias[torch.rand(batch, groups, capacity, generator=generator) < 0.1] = -math.inf
    chunk = torch.zeros(batch, groups, levels, capacity, dtype=torch.int64)
    for level in range(levels):
        ends = torch.rand(batch, groups, capacity, generator=generator) < 0.3 / (level + 1)
        delimiter = -torch.randint(1, 4, ends.shape, generator=generator)
        chunk[:, :, level] = torch.where(ends, delimiter, ends.cumsum(-1))
    bias = bias.expand(batch, heads, capacity).clone()
    return [keys, values, bias, torch.tensor(lengths), chunk, torch.tensor(thresholds), torch.tensor(targets)]


def smallest_margin(inputs: list[Tensor], span: int = 64) -> float:
    """How close the cosine of two slots that may join (same chunk, within span) comes to its level's threshold."""
    keys, chunk, thresholds = inputs[0].double(), inputs[4], inputs[5].double()
    unit = keys / keys.norm(dim=-1, keepdim=True)
    cosine = unit @ unit.mT
    if chunk.shape[1] == 1:
        cosine = cosine.mean(1, keepdim=True)
    slot = torch.arange(keys.shape[2])
    distance = slot[:, None] - slot
    may_join = (chunk[..., :, None] == chunk[..., None, :]) & (distance > 0) & (distance < span)
    gap = (cosine[:, :, None] - thresholds[:, None, None]).abs()
    return float(gap.where(may_join, math.inf).min())


def checked(**options: Any) -> list[Tensor]:
    """Inputs from the first seed whose margin is wide enough."""
    for seed in range(50):
        inputs = make_inputs(**options, seed=seed)
        if smallest_margin(inputs) > MARGIN:
            return inputs
    raise AssertionError("no seed gives a margin")


def published_clusters(unit: Tensor, live: Tensor, chunk: Tensor, threshold: float, span: int) -> dict[int, list[int]]:
    """Algorithm 1 of SemantiCache as printed: seed by seed, over the free slots after it. The form to compare with."""
    assigned: set[int] = set()
    clusters = {}
    slots = [j for j in range(len(live)) if live[j]]
    for i in slots:
        if i in assigned:
            continue
        clusters[i] = [i]
        for j in slots:
            in_chunk = i < j < i + span and chunk[i] >= 0 and chunk[i] == chunk[j]
            if in_chunk and j not in assigned and float((unit[:, i] * unit[:, j]).sum(-1).mean()) > threshold:
                clusters[i].append(j)
                assigned.add(j)
        assigned.add(i)
    return clusters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("span", [4, 16])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (3, 3)])
def test_implementations_agree(heads: int, groups: int, span: int, dtype: torch.dtype) -> None:
    """Ragged lengths (one full, one that fits already), weights, dead slots, three levels."""
    inputs = checked(heads=heads, groups=groups, dtype=dtype)
    out = assert_agree(semantic_cluster, inputs, TOLERANCE[dtype], span=span)
    assert out[5][2] == -1 and (out[5][:2] >= 0).all() and (out[3][:2] < inputs[3][:2]).all()


@pytest.mark.parametrize(("capacity", "span"), [(35, 5), (35, 7), (32, 1), (32, 32), (32, 2)])
def test_any_span_that_divides_the_capacity(capacity: int, span: int) -> None:
    inputs = checked(capacity=capacity, lengths=(capacity, 20), targets=(5, 5), thresholds=(0.4, 0.2, -0.5))
    out = assert_agree(semantic_cluster, inputs, TOLERANCE[torch.float32], span=span)
    live = [int((inputs[2][b, 0, :n] > -math.inf).sum()) for b, n in enumerate(inputs[3].tolist())]
    merged = [n - int(m) for n, m in zip(live, out[3], strict=True)]
    assert merged == [0, 0] if span == 1 else min(merged) > 0


def test_default_span_and_a_longer_cache() -> None:
    options: dict[str, Any] = {"heads": 3, "capacity": 256, "size": 8, "step": 0.3}
    inputs = checked(**options, lengths=(250,), targets=(100,), thresholds=(0.9, 0.7, 0.5))
    assert int(assert_agree(semantic_cluster, inputs, TOLERANCE[torch.float32])[3]) < 200


def test_threads_do_not_race() -> None:
    """Sums into one core, from two threads: the same every time, and the same as one thread's."""
    inputs = checked(heads=3, capacity=1024, size=32, lengths=(1000,), targets=(999,), levels=1, thresholds=(0.5,))
    model = build_model(semantic_cluster.OP, torch.float32, None, {})
    feed = {n: t.numpy() for n, t in zip(semantic_cluster.OP.input_names, inputs, strict=True)}
    expected = open_session(model).run(None, feed)
    session = open_session(model, threads=2)
    for _ in range(5):
        for a, b in zip(expected, session.run(None, feed), strict=True):
            torch.testing.assert_close(torch.from_numpy(b), torch.from_numpy(a), atol=2e-6, rtol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    span=st.sampled_from([2, 5, 8, 40]),
    threshold=st.sampled_from([-0.5, 0.0, 0.5, 0.8, 0.95]),
    step=st.sampled_from([0.1, 0.5, 2.0]),
)
def test_streaming_form_is_algorithm_1(seed: int, span: int, threshold: float, step: float) -> None:
    keys, _, bias, _, chunk, _, _ = make_inputs(capacity=40, lengths=(40,), targets=(1,), step=step, seed=seed)
    unit = torch.nn.functional.normalize(keys[0].double(), dim=-1)
    live = bias[0, 0] > -math.inf
    streaming = semantic_cluster.greedy_clusters(unit, live, chunk[0, 0, 1], threshold, span)
    assert streaming == published_clusters(unit, live, chunk[0, 0, 1], threshold, span)


@pytest.mark.parametrize("kind", ALL)
def test_clusters_are_those_of_algorithm_1(kind: str) -> None:
    inputs = checked(lengths=(32,), targets=(1,), thresholds=(0.9, 0.8, 0.6))
    keys, values, bias, *_ = implementations(semantic_cluster)[kind](*inputs, span=16)
    unit = torch.nn.functional.normalize(inputs[0][0].double(), dim=-1)
    live = inputs[2][0, 0] > -math.inf
    clusters = published_clusters(unit, live, inputs[4][0, 0, 2], 0.6, 16)
    assert max(len(c) for c in clusters.values()) > 2
    for new, members in enumerate(clusters.values()):
        weight = inputs[2][0, :, members].exp()[..., None]
        for got, old in ((keys, inputs[0]), (values, inputs[1])):
            mean = (weight * old[0, :, members]).sum(1) / weight.sum(1)
            torch.testing.assert_close(got[0, :, new], mean, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(bias[0, :, new].exp(), weight.sum((1, 2)), atol=1e-5, rtol=1e-5)
    assert not keys[0, :, len(clusters) :].any() and not values[0, :, len(clusters) :].any()
    assert not bias[0, :, len(clusters) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ALL)
def test_a_threshold_of_one_changes_no_bit(kind: str, groups: int, dtype: torch.dtype) -> None:
    """Nothing joins, so live slots move up and come out as they went in; not even equal keys, whose cosine may round
    to more than 1."""
    inputs = make_inputs(groups=groups, dtype=dtype, size=7, targets=(0, 0, 0), thresholds=(math.inf, 2.0, 1.0))
    inputs[4][:] = 0
    inputs[0] = inputs[0][:, :, torch.arange(32) // 5].contiguous()
    inputs[0][0, 0, 3, 0] = -0.0
    inputs[2][:] = inputs[2][:, :1]
    keys, values, bias, length, source, level = implementations(semantic_cluster)[kind](*inputs, span=16)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    for b, used in enumerate(inputs[3].tolist()):
        live = [j for j in range(used) if inputs[2][b, 0, j] > -math.inf]
        assert int(length[b]) == len(live) and int(level[b]) == 2
        assert source[b, :, : len(live)].tolist() == [live] * groups
        for got, old in ((keys, inputs[0]), (values, inputs[1])):
            assert torch.equal(got[b, :, : len(live)].view(integer), old[b, :, live].view(integer))
        assert torch.equal(bias[b, :, : len(live)], inputs[2][b, :, live])


@pytest.mark.parametrize("lengths", [(32, 20, 9), (0, 20, 9), (9, 9, 0)], ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_a_row_that_fits_is_untouched(kind: str, lengths: tuple[int, ...]) -> None:
    """Bit for bit, dead slots included, whether or not another row of the batch is clustered."""
    inputs = make_inputs(lengths=lengths, targets=(16, 20, 16))
    inputs[0][:, :, 3] = -0.0
    keys, values, bias, length, source, level = implementations(semantic_cluster)[kind](*inputs, span=16)
    for b, used in enumerate(lengths):
        if used > inputs[6][b]:
            assert int(level[b]) >= 0
            continue
        for got, old in ((keys, inputs[0]), (values, inputs[1]), (bias, inputs[2])):
            assert torch.equal(got[b].view(torch.int32), old[b].view(torch.int32))
        assert int(length[b]) == used and int(level[b]) == -1
        assert source[b].tolist() == [[*range(used), *[-1] * (32 - used)]]


@pytest.mark.parametrize("kind", ALL)
def test_an_empty_row_fits_any_target(kind: str) -> None:
    inputs = make_inputs(lengths=(0, 0, 32), targets=(-1, 0, -1))
    keys, _, bias, length, source, level = implementations(semantic_cluster)[kind](*inputs, span=16)
    assert level[:2].tolist() == [-1, -1] and int(level[2]) == 2
    assert length[:2].tolist() == [0, 0] and bool((source[:2] == -1).all())
    assert torch.equal(keys[:2], inputs[0][:2]) and torch.equal(bias[:2], inputs[2][:2])


@pytest.mark.parametrize("kind", ALL)
def test_delimiters_stay_as_they_are(kind: str) -> None:
    """Only delimiters: no slot merges, whatever the threshold, and whichever negative number marks them."""
    inputs = make_inputs(thresholds=(-1.0, -1.0, -1.0), lengths=(32,), targets=(1,), weighted=False)
    inputs[4] = -1 - torch.arange(32).expand_as(inputs[4]) % 3
    keys, values, bias, length, source, _ = implementations(semantic_cluster)[kind](*inputs, span=4)
    assert int(length) == 32 and source.flatten().tolist() == list(range(32))
    assert torch.equal(keys, inputs[0]) and torch.equal(values, inputs[1]) and torch.equal(bias, inputs[2])


@pytest.mark.parametrize("kind", ALL)
def test_the_first_level_that_fits_is_taken(kind: str) -> None:
    run = implementations(semantic_cluster)[kind]
    inputs = checked(lengths=(32,), targets=(0,), thresholds=(0.95, 0.8, 0.3))
    alone = []
    for level in range(3):
        one = [*inputs[:4], inputs[4][:, :, level : level + 1].contiguous(), inputs[5][level : level + 1], inputs[6]]
        alone.append(run(*one, span=16))
    counts = [int(out[3]) for out in alone]
    assert counts[0] > counts[1] > counts[2] > 1
    for target in range(counts[2] - 1, 33):
        out = run(*inputs[:6], torch.tensor([target]), span=16)
        expected = next((level for level in range(3) if counts[level] <= target), 2) if target < 32 else -1
        assert int(out[5]) == expected
        assert int(out[3]) == (counts[expected] if target < 32 else 32)
        if target < 32:
            assert all(torch.equal(a, b) for a, b in zip(out[:3], alone[expected][:3], strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_heads_of_their_own_may_end_at_different_lengths(kind: str) -> None:
    inputs = checked(heads=3, groups=3, lengths=(32,), targets=(1,))
    keys, values, bias, length, source, _ = implementations(semantic_cluster)[kind](*inputs, span=16)
    counts = (source[0] >= 0).sum(-1).tolist()
    assert len(set(counts)) > 1 and int(length) == max(counts)
    for h, count in enumerate(counts):
        assert bool((bias[0, h, :count] > -math.inf).all())
        assert bool((bias[0, h, count : int(length)] == -math.inf).all()) and not bias[0, h, int(length) :].any()
        assert not keys[0, h, count:].any() and not values[0, h, count:].any()
        assert source[0, h, :count].tolist() == sorted(set(source[0, h, :count].tolist()))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ALL)
def test_dead_slots_change_nothing(kind: str, groups: int) -> None:
    """Garbage above the length (any bias) and in slots of bias -inf: every bit of every output stays."""
    inputs = make_inputs(groups=groups, lengths=(30, 20, 25), targets=(12, 8, 12))
    inputs[2][:, :, 4] = -math.inf
    inputs[2][:, :, 17] = -math.inf
    poisoned = [t.clone() for t in inputs]
    for b, used in enumerate((30, 20, 25)):
        dead = [4, 17, *range(used, 32)]
        poisoned[0][b, :, dead] = -3e38
        poisoned[1][b, :, dead] = 1e30
        poisoned[2][b, :, used:] = math.nan
        poisoned[4][b, :, :, dead] = 1
    run = implementations(semantic_cluster)[kind]
    for clean, dirty in zip(run(*inputs, span=16), run(*poisoned, span=16), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ALL)
def test_batch_rows_are_independent(kind: str, groups: int) -> None:
    inputs = checked(groups=groups)
    run = implementations(semantic_cluster)[kind]
    together = run(*inputs, span=16)
    for b in range(3):
        alone = run(*(t if i == 5 else t[b : b + 1].contiguous() for i, t in enumerate(inputs)), span=16)
        for whole, row in zip(together, alone, strict=True):
            torch.testing.assert_close(row[0], whole[b], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_equal_keys_merge_without_loss(kind: str) -> None:
    """Attention over the merged cache is attention over the unmerged one when the keys of each cluster are equal."""
    inputs = make_inputs(lengths=(30, 21), targets=(5, 5), thresholds=(0.9999,) * 3, seed=3)
    inputs[0] = inputs[0][:, :, torch.arange(32) // 3].contiguous()
    keys, values, bias, length, _, _ = implementations(semantic_cluster)[kind](*inputs, span=16)
    assert bool((length < inputs[3] - 8).all())
    new = [torch.randn(2, h, 1, 4, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2)]
    attend = implementations(nexus_attention)["torch" if kind == STATIC_CLUSTER else kind]
    before, after = attend(*new, *inputs[:4]), attend(*new, keys, values, bias, length)
    torch.testing.assert_close(after[0], before[0], atol=2e-6, rtol=2e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), groups=st.sampled_from([1, 2]), step=st.sampled_from([0.1, 0.5, 1.0]))
def test_what_merging_preserves(seed: int, groups: int, step: float) -> None:
    """Total weight, weighted key and value sums; and the merged mass never exceeds the true one (Jensen on exp)."""
    inputs = make_inputs(groups=groups, lengths=(32, 20), targets=(4, 4), step=step, seed=seed)
    keys, values, bias, length, source, _ = implementations(semantic_cluster)["onnxruntime"](*inputs, span=16)
    old_live = (torch.arange(32) < inputs[3][:, None, None]) & (inputs[2] > -math.inf)
    new_live = (torch.arange(32) < length[:, None, None]) & (bias > -math.inf)
    assert torch.equal(new_live[:, :groups], source >= 0)
    old_weight = torch.where(old_live, inputs[2], -math.inf).double().exp()[..., None]
    new_weight = torch.where(new_live, bias, -math.inf).double().exp()[..., None]
    torch.testing.assert_close(new_weight.sum(2), old_weight.sum(2), atol=1e-4, rtol=1e-5)
    for got, old in ((keys, inputs[0]), (values, inputs[1])):
        torch.testing.assert_close((new_weight * got).sum(2), (old_weight * old).sum(2), atol=5e-3, rtol=1e-5)
    query = torch.randn(2, 2, 1, 4, generator=torch.Generator().manual_seed(seed))
    pairs = ((old_weight, inputs[0]), (new_weight, keys))
    true, merged = ((w[..., 0] * (k.double() * query).sum(-1).exp()).sum(-1) for w, k in pairs)
    assert bool((merged <= true * (1 + 1e-4)).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), groups=st.sampled_from([1, 2]), span=st.sampled_from([4, 8, 32]))
def test_onnxruntime_agrees_on_random_data(seed: int, groups: int, span: int) -> None:
    inputs = make_inputs(groups=groups, thresholds=(0.9, 0.6, 0.2), seed=seed)
    assume(smallest_margin(inputs) > MARGIN)
    expected = reference(*inputs, span=span)
    got = implementations(semantic_cluster)["onnxruntime"](*inputs, span=span)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("kind", ALL)
def test_cores_merge_again_by_weight(kind: str) -> None:
    """Merging in two steps gives the same core as merging at once when the same slots end up together."""
    inputs = make_inputs(lengths=(32,), targets=(1,), weighted=False, thresholds=(-1.0,), levels=1)
    quarter, half = (torch.arange(32) // n for n in (4, 8))
    run = implementations(semantic_cluster)[kind]
    inputs[4][:] = half
    once = run(*inputs, span=16)
    inputs[4][:] = quarter
    first = run(*inputs, span=16)
    assert int(first[3]) == 8
    again = half[first[4].clamp_min(0)].view(1, 1, 1, 32)
    twice = run(*first[:4], again, *inputs[5:], span=16)
    assert int(twice[3]) == int(once[3]) == 4
    for a, b in zip(once[:3], twice[:3], strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=2e-6)


def test_bfloat16_and_float64_reference() -> None:
    def cast(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return [*(t.to(dtype) for t in inputs[:2]), *inputs[2:]]

    inputs = checked(lengths=(32,), targets=(10,))
    expected, double = (reference(*cast(inputs, dtype), span=16) for dtype in (torch.float32, torch.float64))
    assert double[0].dtype == torch.float64 and torch.equal(double[4], expected[4])
    torch.testing.assert_close(double[0].float(), expected[0], atol=1e-6, rtol=1e-6)
    low = cast(inputs, torch.bfloat16)
    exact, rounded = reference(*cast(low, torch.float32), span=16), reference(*low, span=16)
    assert torch.equal(rounded[0], exact[0].bfloat16()) and torch.equal(rounded[2], exact[2])


def test_two_nodes_in_one_model_and_inlined() -> None:
    """Names inside the function's subgraphs must survive being inlined twice."""
    inputs = checked(lengths=(32,), targets=(24,), thresholds=(0.9, 0.8, 0.3))
    spec = semantic_cluster.OP
    model = build_model(spec, torch.float32, None, {"span": 16})
    model.graph.node[0].output[:] = [f"first_{name}" for name in spec.output_names]
    second = [f"first_{name}_out" for name in spec.input_names[:4]]
    model.graph.node.append(
        make_node(spec, [*second, "chunk_id", "thresholds", "second_target"], spec.output_names, span=16)
    )
    model.graph.input.append(onnx.helper.make_tensor_value_info("second_target", onnx.TensorProto.INT64, ["B"]))
    onnx.checker.check_model(model, full_check=True)
    feed = {n: t.numpy() for n, t in zip(spec.input_names, inputs, strict=True)}
    feed["second_target"] = torch.tensor([12]).numpy()
    first = reference(*inputs, span=16)
    expected = reference(*first[:4], *inputs[4:6], torch.tensor([12]), span=16)
    assert int(expected[3]) < int(first[3]) < 32
    for variant in (model, onnx.inliner.inline_local_functions(model)):
        for a, b in zip(expected, open_session(variant).run(None, feed), strict=True):
            torch.testing.assert_close(torch.from_numpy(b), a, atol=3e-6, rtol=3e-6)


def test_torch_operator_is_registered_correctly() -> None:
    semantic_cluster.register_torch()
    operator, checks = torch.ops.semkv.semantic_cluster.default, ("test_schema", "test_faketensor")
    results = torch.library.opcheck(operator, tuple(make_inputs()), {"span": 16}, test_utils=checks)
    assert {*results.values()} == {"SUCCESS"}


def test_bad_inputs_are_errors() -> None:
    inputs = make_inputs(heads=3)
    with pytest.raises(SemkvError, match=r"SemanticCluster: the capacity is not a multiple of span .*got 32"):
        reference(*inputs, span=12)
    inputs[4] = inputs[4].expand(-1, 2, -1, -1)
    with pytest.raises(SemkvError, match=r"wrong number of groups .*expected 1 or 3, got 2"):
        reference(*inputs, span=16)
    inputs[4] = inputs[4][:, :1, :2]
    with pytest.raises(SemkvError, match="dimension L differs"):
        reference(*inputs, span=16)

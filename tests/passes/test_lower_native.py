"""`NexusAttention` lowered to TensorScatter and Attention against the operator's reference, run in ONNX Runtime."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import nexus_attention
from semkv_deploy.passes.lower_gqa import BiasMode
from semkv_deploy.passes.lower_native import lower_to_native

from .smallest import decoder, inputs

CAPACITY = 64


def lower(model: onnx.ModelProto, bias: BiasMode, **dims: int) -> tuple[ir.Model, list[str]]:
    """The lowered model, and the kinds of layers promised."""
    graph = ir.from_proto(model)
    # The whole decoder reads sizes from input_ids, which this one lacks: its query stands in.
    graph.graph.inputs.insert(0, ir.Value(name="input_ids", shape=ir.Shape(["batch", "sequence"])))
    graph.graph.inputs[0].type = ir.TensorType(ir.DataType.INT64)
    graph.graph[0].name = "layers.00.attention"
    promises = lower_to_native(graph, bias=bias, dims={"capacity": CAPACITY, **dims})
    assert not any(node.domain for node in graph.graph)
    names = [node.name for node in graph.graph]
    assert all(names.count(promise.node) == 1 for promise in promises)
    return graph, [promise.kind for promise in promises]


@pytest.fixture
def check(parse_dotted: Callable[[str], onnx.ModelProto]) -> Callable[..., Counter[str]]:
    """Compares lowered and reference: (inputs, bias mode, heads, KV heads, attributes); gives the operators used."""
    return functools.partial(_check, parse_dotted)


def _check(
    parse: Callable[[str], onnx.ModelProto],
    feed: dict[str, np.ndarray],
    bias: BiasMode,
    heads: int,
    kv_heads: int,
    dims: dict[str, int] | None = None,
    tolerance: float = 2e-5,
    **attributes: Any,
) -> Counter[str]:
    import onnxruntime as ort
    import torch

    expected = nexus_attention.reference(*(torch.from_numpy(array) for array in feed.values()), **attributes)
    head_dim = feed["query"].shape[3]
    text = decoder(heads, kv_heads, head_dim, **attributes)
    if feed["query"].dtype == np.float16:
        bias_shape = f"[batch,{kv_heads},capacity]"
        text = text.replace("float[", "float16[").replace(f"float16{bias_shape}", f"float{bias_shape}")
    graph, kinds = lower(parse(text), bias, **(dims or {}))
    assert kinds[:2] == ["KV_CACHE_UPDATE"] * 2
    options = ort.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(graph)
    proto.ir_version = 10
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    batch, rows = feed["query"].shape[0], feed["query"].shape[2]
    given = {**feed, "input_ids": np.zeros((batch, rows), np.int64)}
    if heads > kv_heads:
        for part in ("key", "value"):
            cache = given[f"past_key_values.00.{part}"]
            given[f"past_key_values.00.{part}"] = cache.reshape(-1, 1, *cache.shape[2:])
    got = session.run(None, {value.name: given[value.name] for value in session.get_inputs()})
    np.testing.assert_allclose(got[0], expected[0].numpy(), atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs.numpy())
    return Counter(node.op_type for node in graph.graph)


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (3, 3), (4, 1)], ids=["gqa", "mha", "mqa"])
@pytest.mark.parametrize("rows, length", [(1, [0, 30, 63]), (7, [0, 5, 57]), (64, [0, 0, 0])])
@pytest.mark.parametrize("bias", ["head", "layer", "none"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_matches_the_reference(
    check: Any, heads: int, kv_heads: int, rows: int, length: list[int], bias: BiasMode, static: bool
):
    """Empty, part-filled and full caches, dead slots with large values; one and several rows; ragged lengths."""
    feed = inputs(3, heads, kv_heads, rows, CAPACITY, length, head_dim=64)
    if bias == "layer":
        feed["slot_bias.00"][:] = feed["slot_bias.00"][:, :1]
    elif bias == "none":
        feed["slot_bias.00"][:] = 0
    operators = check(feed, bias, heads, kv_heads, {"batch": 3, "sequence": rows} if static else None)
    # In float32 only one row has a fused kernel, and only with four heads.
    fused = int(static and rows == 1 and heads >= 4)
    assert (operators["TensorScatter"], operators["Attention"]) == (2, fused)
    assert not static or operators["Shape"] == 0


@pytest.mark.parametrize("heads", [8, 4])
@pytest.mark.parametrize(
    "attributes", [{"window": 6}, {"scale": 0.3}, {"causal": 0}, {"causal": 0, "window": 9}], ids=str
)
@pytest.mark.parametrize("rows", [1, 5])
def test_attributes(check: Any, attributes: dict[str, Any], rows: int, heads: int):
    feed = inputs(2, heads, 4, rows, CAPACITY, [20, 40], head_dim=64)
    operators = check(feed, "head", heads, 4, {"batch": 2, "sequence": rows}, **attributes)
    assert operators["Attention"] == (rows == 1)


@pytest.mark.parametrize(
    "head_dim, attributes", [(64, {"softcap": 5.0}), (20, {}), (72, {"softcap": 3.0, "window": 4})]
)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("heads", [8, 4])
def test_what_has_no_fused_kernel_is_decomposed(
    check: Any, head_dim: int, attributes: dict[str, Any], rows: int, heads: int
):
    feed = inputs(2, heads, 4, rows, CAPACITY, [20, 40], head_dim=head_dim)
    operators = check(feed, "head", heads, 4, {"batch": 2, "sequence": rows}, **attributes)
    assert (operators["Attention"], operators["Softmax"]) == (0, 1)


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4)])
@pytest.mark.parametrize("rows", [1, 7])
def test_float16_is_fused_for_any_number_of_rows(check: Any, heads: int, kv_heads: int, rows: int):
    """Dead slots hold values up to 400: the mask's floor is above what they give."""
    feed = inputs(3, heads, kv_heads, rows, CAPACITY, [0, 5, 57], head_dim=64)
    large = {name: np.where(abs(array) > 50, array / 100, array) for name, array in feed.items() if array.ndim == 4}
    narrow = {name: array.astype(np.float16) for name, array in large.items()}
    operators = check({**feed, **narrow}, "head", heads, kv_heads, tolerance=5e-3)
    assert operators["Attention"] == 1


def test_dead_slot_below_length(check: Any):
    feed = inputs(2, 4, 2, 3, CAPACITY, [20, 40], head_dim=64)
    feed["slot_bias.00"][:, :, 5:9] = -np.inf
    check(feed, "head", 4, 2)


def test_dynamic_capacity_is_refused(parse_dotted: Callable[[str], onnx.ModelProto]):
    graph = ir.from_proto(parse_dotted(decoder(4, 2)))
    with pytest.raises(SemkvError, match="the capacity is dynamic"):
        lower_to_native(graph, bias="head", dims={})


def test_graph_without_the_operator():
    graph = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) { y = Neg (x) }'
        )
    )
    with pytest.raises(SemkvError, match="no semkv::NexusAttention"):
        lower_to_native(graph, bias="none", dims={"capacity": 64})

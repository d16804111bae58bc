"""`NexusAttention` lowered to `GroupQueryAttention` against the operator's reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import nexus_attention
from semkv_deploy.passes.lower_gqa import BiasMode, lower_to_gqa

from .smallest import decoder, inputs


def lowered_outputs(model: onnx.ModelProto, bias: BiasMode, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    graph = ir.from_proto(model)
    assert lower_to_gqa(graph, bias=bias) == 1
    assert not any(node.domain == "semkv" for node in graph.graph)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})


@pytest.fixture
def check(parse_dotted: Callable[[str], onnx.ModelProto]) -> Callable[..., None]:
    """Compares lowered and reference: (inputs, bias mode, heads, KV heads, attributes)."""
    return functools.partial(_check, parse_dotted)


def _check(
    parse: Callable[[str], onnx.ModelProto],
    feed: dict[str, np.ndarray],
    bias: BiasMode,
    heads: int,
    kv_heads: int,
    **attributes: Any,
) -> None:
    import torch

    tensors = [torch.from_numpy(array) for array in feed.values()]
    expected = [tensor.numpy() for tensor in nexus_attention.reference(*tensors, **attributes)]
    output, key, value = lowered_outputs(parse(decoder(heads, kv_heads, **attributes)), bias, feed)
    np.testing.assert_allclose(output, expected[0], atol=2e-5, rtol=2e-5)
    rows = feed["query"].shape[2]
    for row, length in enumerate(feed["length"]):
        for ours, theirs in ((key, expected[1]), (value, expected[2])):
            np.testing.assert_array_equal(ours[row, :, : length + rows], theirs[row, :, : length + rows])


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (3, 3), (4, 1)], ids=["gqa", "mha", "mqa"])
@pytest.mark.parametrize("rows, length", [(1, [0, 30, 63]), (7, [0, 5, 57]), (64, [0, 0, 0])])
@pytest.mark.parametrize("bias", ["head", "layer", "none"])
def test_matches_the_reference(check: Any, heads: int, kv_heads: int, rows: int, length: list[int], bias: BiasMode):
    """Empty, part-filled and full caches; one and several rows; ragged lengths in a batch."""
    feed = inputs(3, heads, kv_heads, rows, 64, length)
    if bias == "layer":
        feed["slot_bias.00"][:] = feed["slot_bias.00"][:, :1]
    elif bias == "none":
        feed["slot_bias.00"][:] = 0
    check(feed, bias, heads, kv_heads)


@pytest.mark.parametrize("attributes", [{"softcap": 5.0}, {"window": 6}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_attributes(check: Any, attributes: dict[str, Any], rows: int):
    check(inputs(2, 4, 2, rows, 64, [20, 40]), "head", 4, 2, **attributes)


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_see_each_other(check: Any, rows: int):
    check(inputs(1, 4, 2, rows, 64, [20]), "head", 4, 2, causal=0)


def test_dead_slot_below_length(check: Any):
    feed = inputs(2, 4, 2, 3, 64, [20, 40])
    feed["slot_bias.00"][:, :, 5:9] = -np.inf
    check(feed, "head", 4, 2)


def test_graph_without_the_operator():
    graph = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) { y = Neg (x) }'
        )
    )
    with pytest.raises(SemkvError, match="no semkv::NexusAttention"):
        lower_to_gqa(graph, bias="none")

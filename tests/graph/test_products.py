"""Products by quantised weights, their activations not rounded."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from semkv_deploy.graph.products import reads_quantised_weights, use_float32_activations

SCALE = np.float32(0.02)
RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.integers(-127, 127, (8, 6)).astype(np.int8)


def graph(nodes: list[onnx.NodeProto], *held: onnx.TensorProto) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 8])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 6])]
    weights = [numpy_helper.from_array(WEIGHTS, "w"), numpy_helper.from_array(SCALE, "s")]
    made = helper.make_graph(nodes, "g", ends, out, [*weights, *held])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def integer(zero: np.ndarray | None) -> onnx.ModelProto:
    """As quantize_dynamic writes it."""
    given = ["x8", "w", "xz", *([] if zero is None else ["wz"])]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["x8", "xs", "xz"]),
        helper.make_node("MatMulInteger", given, ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "s"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    model = graph(nodes, *([] if zero is None else [numpy_helper.from_array(zero, "wz")]))
    model.graph.value_info.append(helper.make_tensor_value_info("i", TensorProto.INT32, [3, 6]))
    return model


def pair() -> onnx.ModelProto:
    """As quantize_static writes it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", "s"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    return graph(nodes)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("model", "zero"),
    [(integer(None), 0), (integer(np.int8(3)), 3), (integer(np.arange(6, dtype=np.int8)), np.arange(6)), (pair(), 0)],
    ids=["integers", "zero", "zeros by column", "pair"],
)
def test_activations_are_as_they_are(model: onnx.ModelProto, zero: np.ndarray | int):
    x = np.abs(RANDOM.standard_normal((3, 8)).astype(np.float32))
    exact = x @ ((WEIGHTS.astype(np.float32) - zero) * SCALE)
    rounding = np.abs(run(model, x) - exact).max()
    use_float32_activations(model)
    onnx.checker.check_model(model, full_check=True)
    assert np.abs(run(model, x) - exact).max() < 1e-5 < 1e-3 < rounding


@pytest.mark.parametrize(("model", "operator"), [(integer(None), "MatMulInteger"), (pair(), "DequantizeLinear")])
def test_the_operator_that_reads_quantised_weights_is_named(model: onnx.ModelProto, operator: str):
    assert reads_quantised_weights(model.graph) == operator


def test_rounded_activations_are_no_weights():
    model = pair()
    del model.graph.node[2]
    model.graph.node[2].input[1] = "w"
    assert reads_quantised_weights(model.graph) is None

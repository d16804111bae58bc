"""Weights in few bits: which tables and products are stored so, what is left in float32, and how far it is off."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from semkv_deploy.passes.quantize import float32_bytes, quantize_weights

ROWS, WIDTH = 96, 64


def model(path: Path, *, tied: bool, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Embedding, one product, head: a decoder's weights and nothing else. Returns the table and the head `[W,V]`."""
    random = np.random.default_rng(0)
    table = random.standard_normal((ROWS, width)).astype(np.float32)
    inner = random.standard_normal((width, width)).astype(np.float32)
    head = table.T.copy() if tied else random.standard_normal((width, ROWS)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["embedded"], name="embed", axis=0)]
    nodes += [helper.make_node("MatMul", ["embedded", "inner"], ["hidden"], name="inner_product")]
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(inner, "inner")]
    if tied:
        nodes += [helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0], name="turn")]
        nodes += [helper.make_node("MatMul", ["hidden", "turned"], ["logits"], name="head")]
    else:
        weights.append(numpy_helper.from_array(head, "head_weight"))
        nodes += [helper.make_node("MatMul", ["hidden", "head_weight"], ["logits"], name="head")]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4, ROWS])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return table, head


def run(graph: onnx.ModelProto) -> Any:
    import onnxruntime as ort

    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.array([[3, 95, 0, 41]])})[0]


@pytest.mark.parametrize("weights, error", [("int8", 0.03), ("int4", 0.25)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_nothing_large_stays_in_float32(weights: Any, error: float, tied: bool, tmp_path: Path):
    model(tmp_path / "m.onnx", tied=tied)
    exact = run(onnx.load(tmp_path / "m.onnx"))
    quantized = ir.to_proto(quantize_weights(tmp_path / "m.onnx", weights))
    assert [node.op_type for node in quantized.graph.node] == ["GatherBlockQuantized", "MatMulNBits", "MatMulNBits"]
    bits = [a.i for node in quantized.graph.node for a in node.attribute if a.name == "bits"]
    # A head that is the embedding stays at 8 bits: it decides the token.
    inner = 8 if weights == "int8" else 4
    assert bits == [8, inner, 8 if tied else inner]
    scales = (ROWS * WIDTH + WIDTH * WIDTH + WIDTH * ROWS) // 32 * 4
    assert float32_bytes(quantized) == scales
    assert 0 < np.abs(run(quantized) - exact).max() / np.abs(exact).max() < error


def test_quantising_leaves_the_processs_logging_alone(tmp_path: Path):
    model(tmp_path / "m.onnx", tied=True)
    program = (
        "import logging, sys\nfrom pathlib import Path\nfrom semkv_deploy.passes.quantize import quantize_weights\n"
        "quantize_weights(Path(sys.argv[1]), 'int4')\n"
        "assert logging.getLogger().level == logging.WARNING and not logging.getLogger().handlers"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "m.onnx"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_table_of_odd_rows_stays_as_it_is(tmp_path: Path):
    model(tmp_path / "m.onnx", tied=False, width=48)
    quantized = ir.to_proto(quantize_weights(tmp_path / "m.onnx", "int8"))
    assert [node.op_type for node in quantized.graph.node] == ["Gather", "MatMulNBits", "MatMulNBits"]

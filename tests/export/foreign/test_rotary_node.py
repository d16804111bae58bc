"""RotaryEmbedding nodes become standard operators that compute the same, or are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.rotary import rotary_of
from semkv_deploy.export.foreign.rotary_node import expand_rotary

HEADS, POSITIONS = 3, 40
FREQUENCIES = 1e4 ** -np.linspace(0, 0.9, 8)
ANGLES = np.arange(POSITIONS)[:, None] * FREQUENCIES


def rotary(shape: list[Any], columns: int, **attributes: Any) -> onnx.ModelProto:
    """One node, its tables of so many columns."""
    places = ["x", "position_ids", "cos", "sin"]
    node = helper.make_node("RotaryEmbedding", places, ["y"], name="turn", domain="com.microsoft", **attributes)
    given = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "rows"]),
    ]
    tables = {"cos": np.cos(ANGLES[:, :columns]), "sin": np.sin(ANGLES[:, :columns])}
    held = [numpy_helper.from_array(table.astype(np.float32), name) for name, table in tables.items()]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    graph = helper.make_graph([node], "one", given, result, held)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, feeds)
    return np.asarray(result)


SIDE_BY_SIDE, HEADS_FIRST = ["batch", "rows", HEADS * 16], ["batch", HEADS, "rows", 16]


@pytest.mark.parametrize(
    ("shape", "columns", "attributes"),
    [
        (SIDE_BY_SIDE, 8, {}),
        (HEADS_FIRST, 8, {}),
        (SIDE_BY_SIDE, 8, {"num_heads": HEADS}),
        (SIDE_BY_SIDE, 4, {"num_heads": HEADS, "rotary_embedding_dim": 8}),
    ],
)
def test_standard_operators_compute_what_the_node_does(shape: list[Any], columns: int, attributes: Any):
    proto = rotary(shape, columns, **attributes)
    random = np.random.default_rng(0)
    sizes = [{"batch": 2, "rows": 5}.get(size, size) for size in shape]
    positions = np.array([[0, 7, 3, 39, 1], [5, 6, 7, 8, 9]])
    feeds = {"x": random.standard_normal(sizes).astype(np.float32), "position_ids": positions}
    expected = run(proto, feeds)
    model = ir.from_proto(proto)
    assert expand_rotary(model.graph) == 1
    assert not any(node.op_type == "RotaryEmbedding" for node in model.graph)
    got = run(ir.to_proto(model), feeds)
    assert np.abs(expected - feeds["x"]).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"interleaved": 1}, "RotaryEmbedding with interleaved"),
        ({"scale": 0.5}, "RotaryEmbedding with scale"),
        ({"rotary_embedding_dim": 8, "num_heads": HEADS}, "RotaryEmbedding with a part that its tables do not turn"),
    ],
)
def test_what_is_not_known_is_refused(attributes: Any, said: str):
    model = ir.from_proto(rotary(SIDE_BY_SIDE, 8, **attributes))
    with pytest.raises(SemkvError, match=f"turn: {said}"):
        expand_rotary(model.graph)


def test_one_position_for_all_rows_is_refused():
    proto = rotary(SIDE_BY_SIDE, 8)
    proto.graph.input[1].CopyFrom(helper.make_tensor_value_info("position_ids", TensorProto.INT64, [1]))
    with pytest.raises(SemkvError, match="other tables or positions"):
        expand_rotary(ir.from_proto(proto).graph)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("positions", [2, 3, 512, 8192])
def test_frequencies_are_read_off_tables_of_either_type(dtype: type, positions: int):
    angles = np.arange(positions, dtype=np.float32)[:, None] * FREQUENCIES.astype(np.float32)
    cos, sin = (function(angles).astype(dtype).astype(np.float64) for function in (np.cos, np.sin))
    found = rotary_of(cos, sin)
    assert found is not None
    off = np.abs(np.array(found.inv_freq) - FREQUENCIES).max() * (positions - 1)
    assert off < (1e-4 if dtype is np.float32 else 1e-3), "angles of the last position"
    cos[-1, 0] += 1e-2
    assert rotary_of(cos, sin) is None

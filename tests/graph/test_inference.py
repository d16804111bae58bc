"""Inference of types and shapes, where a graph states wrong ones."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, parser

from semkv_deploy.graph.inference import infer_types

SOURCE = """
<ir_version: 10, opset_import: ["": 21]>
decoder (float[n] x) => (float[m] y) {
  one = Constant <value = int64[1] {1}> ()
  tail = Slice (x, one, one)
  y = Neg (tail)
}
"""


def test_a_constants_shape_is_its_tensors(caplog: pytest.LogCaptureFixture):
    proto = parser.parse_model(SOURCE)
    proto.graph.value_info.append(helper.make_tensor_value_info("one", TensorProto.INT64, []))
    model = ir.from_proto(proto)
    infer_types(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert values["one"].shape == ir.Shape([1])
    assert values["tail"].dtype == ir.DataType.FLOAT and len(values["tail"].shape or ()) == 1
    assert not caplog.records


def test_what_cannot_be_inferred_stays_without_a_word(caplog: pytest.LogCaptureFixture):
    proto = parser.parse_model(SOURCE)
    proto.graph.value_info.append(helper.make_tensor_value_info("tail", TensorProto.FLOAT, [3, 4]))
    model = ir.from_proto(proto)
    infer_types(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert values["tail"].shape == ir.Shape([3, 4])
    assert not caplog.records

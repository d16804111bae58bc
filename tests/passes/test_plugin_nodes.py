"""Attributes of nodes that become plugins: the importer would drop a wrong one without a word."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import SPECS
from semkv_deploy.ops.spec import make_node
from semkv_deploy.passes.plugin_nodes import keep_as_plugins


def block_map(**attributes: float | int | list[int]) -> ir.Model:
    """One SemanticBlockMap node of which `attributes` are set."""
    spec = SPECS["SemanticBlockMap"]
    node = make_node(spec, spec.input_names, spec.output_names, "map")
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    elements = {"T": TensorProto.FLOAT16, "int64": TensorProto.INT64}
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, elements[t.dtype], t.dims) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    )
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs),
        opset_imports=[onnx.helper.make_opsetid("semkv", 1)],
    )
    return ir.from_proto(model)


def keep(model: ir.Model) -> ir.Node:
    keep_as_plugins(model, {"SemanticBlockMap"}, bias="head", dims={})
    return model.graph.node("plugin.SemanticBlockMap.0")


def test_right_attributes_stay_and_defaults_are_added() -> None:
    node = keep(block_map(vectors=1))
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "vectors": 1,
        "max_block_length": 40,
        "plugin_namespace": "semkv",
        "plugin_version": "1",
    }
    # Twice is as good as once.
    assert keep(block_map(vectors=2, max_block_length=2**31 - 1)).attributes["max_block_length"].value == 2**31 - 1


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"vector": 1}, r"node map: SemanticBlockMap has no attribute vector \(expected .*'vectors'.*got 1"),
        ({"vectors": 1.0}, r"attribute vectors of SemanticBlockMap has the wrong type \(expected int, got float\)"),
        ({"vectors": [1, 2]}, "expected int, got ints"),
        ({"max_block_length": 2**32 + 40}, "max_block_length of SemanticBlockMap is out of range.*got 4294967336"),
        ({"max_block_length": -(2**31) - 1}, "out of range"),
    ],
)
def test_wrong_attributes_are_refused(attributes: dict[str, float | int | list[int]], message: str) -> None:
    with pytest.raises(SemkvError, match=message):
        keep(block_map(**attributes))


def test_an_option_is_an_attribute_of_its_name() -> None:
    spec = SPECS["NexusAttention"].with_options("indexed")
    node = ir.from_proto(make_node(spec, spec.input_names, spec.output_names))
    graph = ir.Graph([], [], nodes=[node], opset_imports={"semkv": 1})
    node.attributes["mass"] = ir.AttrFloat32("mass", 1.0)
    cache = ir.Value(name="key_cache", type=ir.TensorType(ir.DataType.FLOAT16))
    graph.inputs.append(cache)
    with pytest.raises(SemkvError, match="attribute mass of NexusAttention has the wrong type"):
        keep_as_plugins(ir.Model(graph, ir_version=10), {"NexusAttention"}, bias="head", dims={})

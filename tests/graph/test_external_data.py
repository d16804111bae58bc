"""External data that is elsewhere, cut short, of odd sizes, or hidden in attributes, subgraphs and functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.external import read_graph
from semkv_deploy.graph.external_data import external_faults, external_tensors


def external(name: str = "w", dims: tuple[int, ...] = (4,), **record: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), name)
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in record.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*initializers: TensorProto, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(nodes or [], "g", [], [], list(initializers)))


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    (inside / "w.bin").write_bytes(bytes(16))
    (inside / "sub" / "w.bin").write_bytes(bytes(16))
    (tmp_path / "outside.bin").write_bytes(bytes(16))
    (inside / "link.bin").symlink_to(tmp_path / "outside.bin")
    return inside


@pytest.mark.parametrize(
    "record",
    [{}, {"length": "16"}, {"offset": "0", "length": "16"}, {"location": "sub/w.bin"}, {"location": "./w.bin"}],
)
def test_plain_data_is_no_fault(record: dict[str, str], folder: Path):
    assert list(external_faults(model(external(**{"location": "w.bin"} | record)), folder)) == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"location": ""}, "without a location"),
        ({"location": "/etc/hostname"}, "absolute path"),
        ({"location": "C:\\x"}, "absolute path"),
        ({"location": "../outside.bin"}, "above the model's folder"),
        ({"location": "sub/../../outside.bin"}, "above the model's folder"),
        ({"location": "..\\outside.bin"}, "above the model's folder"),
        ({"location": "link.bin"}, "is a link"),
        ({"location": "sub"}, "is missing"),
        ({"location": "."}, "no file's name"),
        ({"location": "w.bin\0x"}, "no file's name"),
        ({"location": "w.bin", "offset": "-1"}, "no number of bytes"),
        ({"location": "w.bin", "offset": "1e3"}, "no number of bytes"),
        ({"location": "w.bin", "offset": "9" * 5000}, "no number of bytes"),
        ({"location": "w.bin", "offset": "4"}, "is truncated"),
        ({"location": "w.bin", "length": "12"}, "12 bytes for a tensor of 16"),
    ],
)
def test_faults(record: dict[str, str], words: str, folder: Path):
    ((name, fault),) = external_faults(model(external(**record)), folder)
    assert name == "w" and words in fault


def test_a_tensor_of_negative_size(folder: Path):
    ((_, fault),) = external_faults(model(external(dims=(-4,), location="w.bin")), folder)
    assert "negative size" in fault


NOT_UTF8 = b"\xff\xfe"


@pytest.mark.parametrize("place", ["node", "attribute", "location"])
def test_a_graph_with_text_that_is_not_utf8_is_no_graph(place: str, tmp_path: Path):
    """protobuf parses it, and gives bytes where text should be."""
    model = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="relu")], "g", [], []))
    node = model.graph.node[0]
    if place == "node":
        node.MergeFromString(b"\x1a\x02" + NOT_UTF8)
    elif place == "attribute":
        node.attribute.add().MergeFromString(b"\x0a\x02" + NOT_UTF8)
    else:
        tensor = model.graph.initializer.add(data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location").MergeFromString(b"\x12\x02" + NOT_UTF8)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SemkvError, match="not an ONNX model"):
        read_graph(path, expected="a graph", fix="give another")


def test_tensors_are_found_wherever_they_are():
    constant = helper.make_node("Constant", [], ["c"], value=external("in_node", location="a"))
    branch = helper.make_graph([constant], "b", [], [], [external("in_branch", location="b")])
    choice = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    whole = model(external("in_graph", location="c"), nodes=[choice])
    inner = helper.make_node("Constant", [], ["c"], value=external("in_function", location="d"))
    whole.functions.append(helper.make_function("f", "F", [], ["c"], [inner], [helper.make_opsetid("", 20)]))
    found = {tensor.name for tensor in external_tensors(whole)}
    assert found == {"in_graph", "in_node", "in_branch", "in_function"}

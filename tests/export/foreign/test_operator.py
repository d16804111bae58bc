"""ONNX's own `Attention`: on caches that Concat grows, on a past that it appends to, or refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import import_decoder

from .conftest import TorchExported

Change = Callable[[onnx.NodeProto, onnx.GraphProto], None]


@pytest.fixture(scope="module")
def source(torch_exported: TorchExported) -> Path:
    """A decoder with as many KV heads as query heads, so that nothing stands between caches and `Attention`."""
    return torch_exported("llama", opset=23, num_key_value_heads=4)


def imported(source: Path, place: Path, change: Change) -> onnx.GraphProto:
    shutil.copytree(source.parent, place / "source")
    (place / "out").mkdir()
    path = place / "source" / source.name
    model = onnx.load(path, load_external_data=False)
    change(next(node for node in model.graph.node if node.op_type == "Attention"), model.graph)
    path.write_bytes(model.SerializeToString())
    import_decoder(path, place / "out")
    return onnx.load(place / "out" / "decoder.onnx", load_external_data=False).graph


def nothing(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    """As torch writes it."""


def own_past(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    """Its Concats become its own past and present."""
    while len(node.input) < 6:
        node.input.append("")
    for place, kind in ((1, "key"), (2, "value")):
        concat = next(each for each in graph.node if each.op_type == "Concat" and f"present.0.{kind}" in each.output)
        assert node.input[place] == concat.output[0]
        node.input[place], node.input[3 + place] = concat.input[1], concat.input[0]
        node.output.append(concat.output[0])
        graph.node.remove(concat)


@pytest.mark.parametrize("change", [nothing, own_past])
def test_import_is_proved_against_the_original(change: Change, source: Path, tmp_path: Path):
    graph = imported(source, tmp_path, change)
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("NexusAttention") == 1 and "Attention" not in kinds


def attribute(name: str, value: int) -> Change:
    def change(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def without_mask(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    node.input[3] = ""


def one_cache(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    node.input[2] = node.input[1]


def products(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    node.output.extend(["", "", "products"])
    graph.node.append(helper.make_node("Identity", ["products"], ["more"], name="more"))
    logits = next(each for each in graph.node if "logits" in each.output)
    logits.output[0] = "logits.before"
    graph.node.append(helper.make_node("ReduceMax", ["more"], ["largest"], name="largest", keepdims=0))
    graph.node.append(helper.make_node("Add", ["logits.before", "largest"], ["logits"], name="added"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (attribute("is_causal", 1), "expected a mask, got is_causal"),
        (without_mask, "expected a mask, got none"),
        (one_cache, "a cache of its own for keys and values"),
        (products, "no use of its products"),
    ],
)
def test_what_it_has_and_we_have_not_is_refused(change: Change, said: str, source: Path, tmp_path: Path):
    with pytest.raises(SemkvError, match=said):
        imported(source, tmp_path, change)

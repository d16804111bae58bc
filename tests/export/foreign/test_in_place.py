"""Caches of constant size that `TensorScatter` writes (opset 24): imported and proved, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import import_decoder, recognised

from .conftest import TorchExported
from .test_multi_head import HEADS, SIZE, add, constant, rows

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def source(torch_exported: TorchExported) -> Path:
    return torch_exported("llama", opset=23, num_key_value_heads=HEADS)


def scattered(model: onnx.ModelProto, *, flat: bool, capacity: int | str = "slots") -> onnx.NodeProto:
    """The same decoder with a static cache, as mobius writes it: where to write and what is live are inputs."""
    graph = model.graph
    model.opset_import[0].version = 24
    for name in ("write_indices", "nonpad_kv_seqlen"):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch"]))
    (attention,) = [node for node in graph.node if node.op_type == "Attention"]
    caches = []
    for place, kind in ((1, "key"), (2, "value")):
        (concat,) = [node for node in graph.node if node.output[0] == f"present.0.{kind}"]
        new = rows(graph, concat, concat.input[1]) if flat else concat.input[1]
        shape = ["batch", capacity, HEADS * SIZE] if flat else ["batch", HEADS, capacity, SIZE]
        for values, name in ((graph.input, concat.input[0]), (graph.output, concat.output[0])):
            (stale,) = [each for each in values if each.name == name]
            stale.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        scatter = helper.make_node(
            "TensorScatter",
            [concat.input[0], new, "write_indices"],
            [concat.output[0]],
            name=f"scatter.{kind}",
            axis=1 if flat else 2,
        )
        graph.node.insert(list(graph.node).index(concat), scatter)
        graph.node.remove(concat)
        caches.append((attention.input[place], scatter.output[0]))
    assert [before for before, _ in caches] == [after for _, after in caches]
    query, result = attention.input[0], attention.output[0]
    settings = {"is_causal": 1, "scale": helper.get_node_attr_value(attention, "scale")}
    if flat:
        settings |= {"q_num_heads": HEADS, "kv_num_heads": HEADS}
        query = rows(graph, attention, query)
    inputs = [query, caches[0][1], caches[1][1], "", "", "", "nonpad_kv_seqlen"]
    made = helper.make_node("Attention", inputs, ["attended"], name="static", **settings)
    graph.node.insert(list(graph.node).index(attention), made)
    graph.node.remove(attention)
    after = next(node for node in graph.node if result in node.input)
    if flat:
        constant(graph, "in_heads", np.array([0, 0, HEADS, SIZE]))
        split = add(graph, after, "Reshape", ["attended", "in_heads"], "attended.split")
        add(graph, after, "Transpose", [split], result, perm=[0, 2, 1, 3])
    else:
        add(graph, after, "Identity", ["attended"], result)
    (mask,) = [each for each in graph.input if each.name == "attention_mask"]
    graph.input.remove(mask)
    stale_names = {"attention_mask"}
    for node in list(graph.node):
        if stale_names & set(node.input):
            stale_names |= set(node.output)
            graph.node.remove(node)
    del graph.value_info[:]
    return next(node for node in graph.node if node.name == "static")


def imported(source: Path, place: Path, change: Change) -> onnx.GraphProto:
    import shutil

    shutil.copytree(source.parent, place / "source")
    (place / "out").mkdir()
    path = place / "source" / source.name
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    import_decoder(path, place / "out")
    return onnx.load(place / "out" / "decoder.onnx", load_external_data=False).graph


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("capacity", ["slots", 100])
def test_import_is_proved_against_the_original(flat: bool, capacity: int | str, source: Path, tmp_path: Path):
    graph = imported(source, tmp_path, lambda model: scattered(model, flat=flat, capacity=capacity))
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("NexusAttention") == 1 and not {"Attention", "TensorScatter"} & set(kinds)
    assert not {"write_indices", "nonpad_kv_seqlen"} & {each.name for each in graph.input}
    (key,) = [each for each in graph.input if each.name == "past_key_values.00.key"]
    assert len(key.type.tensor_type.shape.dim) == 4
    said = recognised(tmp_path / "source" / "model.onnx")
    assert said == "1 x Attention of opset 24 on TensorScatter; positions: by position_ids"


def attribute(name: str, value: object) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = scattered(model, flat=False)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def circular(model: onnx.ModelProto) -> None:
    scattered(model, flat=False)
    for node in model.graph.node:
        if node.op_type == "TensorScatter":
            node.attribute.append(helper.make_attribute("mode", "circular"))


def masked(mask: Callable[[onnx.GraphProto, onnx.NodeProto], str], *, capacity: int | str = "slots", **settings: int):
    """A change: a mask beside the node's own, or in its place."""

    def change(model: onnx.ModelProto) -> None:
        node = scattered(model, flat=False, capacity=capacity)
        node.input[3] = mask(model.graph, node)
        for name, value in settings.items():
            node.attribute.remove(next(each for each in node.attribute if each.name == name))
            node.attribute.append(helper.make_attribute(name, value))

    return change


def places(graph: onnx.GraphProto, before: onnx.NodeProto) -> tuple[str, str]:
    """Of slots `[C]`, and of rows `[B,1,S,1]`."""
    for name, value in (("zero", 0), ("one", 1)):
        constant(graph, name, np.array(value))
    constant(graph, "apart", np.array([1, 3]))
    size = add(graph, before, "Shape", ["past_key_values.0.key"], "sizes", start=2, end=3)
    only = add(graph, before, "Squeeze", [size], "size")
    return (
        add(graph, before, "Range", ["zero", only, "one"], "slot"),
        add(graph, before, "Unsqueeze", ["position_ids", "apart"], "row"),
    )


def causal_mask(graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
    """Causality once more, as a condition; slots that are not written come later than any row."""
    slot, row = places(graph, node)
    return add(graph, node, "LessOrEqual", [slot, row], "seen")


def causal_added(graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
    """The same, added to the logits."""
    seen = causal_mask(graph, node)
    constant(graph, "hidden", np.float32(-1e9))
    constant(graph, "shown", np.float32(0))
    return add(graph, node, "Where", [seen, "shown", "hidden"], "added")


def live_mask(graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
    """What is written, by the host's count."""
    slot, row = places(graph, node)
    constant(graph, "rows_of_batch", np.array([1, 2, 3]))
    count = add(graph, node, "Unsqueeze", ["nonpad_kv_seqlen", "rows_of_batch"], "count")
    return of_all_rows(graph, node, add(graph, node, "Less", [slot, count], "live"), row)


def of_all_rows(graph: onnx.GraphProto, before: onnx.NodeProto, condition: str, row: str) -> str:
    """`[B,1,S,C]` of `[B,1,1,C]`: ONNX Runtime takes no other."""
    ever = add(graph, before, "GreaterOrEqual", [row, "zero"], "ever")
    return add(graph, before, "And", [condition, ever], "of_all_rows")


def padding_mask(graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
    """The host's own mask, as wide as the caches."""
    graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "slots"]))
    constant(graph, "of_heads", np.array([1, 2]))
    _, row = places(graph, node)
    wide = add(graph, node, "Unsqueeze", ["attention_mask", "of_heads"], "wide")
    return of_all_rows(graph, node, add(graph, node, "Cast", [wide], "padding", to=int(TensorProto.BOOL)), row)


def window_mask(graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
    slot, row = places(graph, node)
    constant(graph, "seven", np.array(7))
    back = add(graph, node, "Sub", [row, slot], "back")
    return add(graph, node, "Less", [back, "seven"], "near")


def first_hidden(graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
    """The first slot is never seen."""
    slot, row = places(graph, node)
    near = add(graph, node, "LessOrEqual", [slot, row], "seen")
    late = add(graph, node, "Greater", [slot, "zero"], "late")
    return add(graph, node, "And", [near, late], "but_the_first")


@pytest.mark.parametrize(
    ("change", "window"),
    [
        (masked(causal_mask), 0),
        (masked(causal_mask, is_causal=0), 0),
        (masked(causal_added, capacity=100), 0),
        (masked(live_mask), 0),
        (masked(padding_mask), 0),
        (masked(window_mask), 7),
        (masked(window_mask, capacity=100), 7),
    ],
)
def test_a_mask_that_says_no_more_is_taken(change: Change, window: int, source: Path, tmp_path: Path):
    graph = imported(source, tmp_path, change)
    (node,) = [node for node in graph.node if node.op_type == "NexusAttention"]
    assert helper.get_node_attr_value(node, "window") == window
    left = {"write_indices", "nonpad_kv_seqlen", "attention_mask"} & {each.name for each in graph.input}
    assert not left


def without_lengths(model: onnx.ModelProto) -> None:
    scattered(model, flat=False).input[6] = ""


def other_places(model: onnx.ModelProto) -> None:
    scattered(model, flat=False)
    next(node for node in model.graph.node if node.name == "scatter.value").input[2] = "nonpad_kv_seqlen"


def counted(model: onnx.ModelProto) -> None:
    """Positions by where rows are written, and not by an input of their own."""
    scattered(model, flat=False)
    graph = model.graph
    constant(graph, "last", np.array([-1]))
    first = graph.node[0]
    add(graph, first, "Unsqueeze", ["write_indices", "last"], "written")
    place = add(graph, first, "Add", ["position_ids", "written"], "counted")
    for node in list(graph.node)[2:]:
        node.input[:] = [place if name == "position_ids" else name for name in node.input]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (attribute("is_causal", 0), "expected is_causal 1, or a mask, got neither"),
        (circular, "from the front to the end, got mode .*circular"),
        (masked(first_hidden), "a mask that is not causal .*got but_the_first"),
        (masked(live_mask, is_causal=0), "a mask that is not causal"),
        (masked(window_mask, is_causal=0), "a mask that (is not causal|shows slots that nothing was written to)"),
        (without_lengths, "nonpad_kv_seqlen, an input of the graph"),
        (other_places, "write_indices, one input of the graph"),
        (counted, "counts positions by the length of its cache .*got write_indices"),
    ],
)
def test_what_differs_is_refused(change: Change, said: str, source: Path, tmp_path: Path):
    with pytest.raises(SemkvError, match=said):
        imported(source, tmp_path, change)

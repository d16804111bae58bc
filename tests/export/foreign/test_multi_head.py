"""`com.microsoft::MultiHeadAttention`: made of a decoder's `Attention`, imported and proved, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import recognised

from .conftest import TorchExported
from .test_operator import imported

Graph = onnx.GraphProto
Change = Callable[[onnx.NodeProto, Graph], None]
HEADS, SIZE = 4, 8


@pytest.fixture(scope="module")
def source(torch_exported: TorchExported) -> Path:
    """A decoder with as many KV heads as query heads."""
    return torch_exported("llama", opset=23, num_key_value_heads=HEADS)


def add(graph: Graph, before: onnx.NodeProto, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
    domain = attributes.pop("domain", "")
    node = helper.make_node(kind, inputs, [output], name=f"{output}.node", domain=domain, **attributes)
    graph.node.insert(list(graph.node).index(before), node)
    return output


def constant(graph: Graph, name: str, value: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def rows(graph: Graph, before: onnx.NodeProto, heads_first: str) -> str:
    """`[B,S,H*D]` of `[B,H,S,D]`."""
    if not any(tensor.name == "side_by_side" for tensor in graph.initializer):
        constant(graph, "side_by_side", np.array([0, 0, HEADS * SIZE]))
    last = add(graph, before, "Transpose", [heads_first], f"{heads_first}.last", perm=[0, 2, 1, 3])
    return add(graph, before, "Reshape", [last, "side_by_side"], f"{heads_first}.rows")


def multi_head(node: onnx.NodeProto, graph: Graph, *, own_past: bool = True, **attributes: object) -> onnx.NodeProto:
    """The same attention as a MultiHeadAttention; its mask is added to the logits."""
    (made,) = [each for each in graph.node if each is node or each == node]
    query, mask, result = node.input[0], node.input[3], node.output[0]
    inputs, outputs = [rows(graph, made, query)], ["attended"]
    pasts = []
    for place, kind in ((1, "key"), (2, "value")):
        present = node.input[place]
        if not own_past:
            inputs.append(rows(graph, made, present))
            continue
        (concat,) = [each for each in graph.node if present in each.output]
        inputs.append(rows(graph, made, concat.input[1]))
        pasts.append(concat.input[0])
        outputs.append(present)
        graph.node.remove(concat)
        assert kind in concat.input[0]
    constant(graph, "hidden", np.float32(-1e9))
    constant(graph, "seen", np.float32(0))
    added = add(graph, made, "Where", [mask, "seen", "hidden"], "added_mask")
    scale = helper.get_node_attr_value(node, "scale")
    settings = {"num_heads": HEADS, "scale": scale, **attributes}
    fused = helper.make_node(
        "MultiHeadAttention",
        [*inputs, "", "", added, *pasts],
        outputs,
        name="mha",
        domain="com.microsoft",
        **settings,
    )
    graph.node.insert(list(graph.node).index(made), fused)
    graph.node.remove(made)
    after = next(each for each in graph.node if result in each.input)
    constant(graph, "in_heads", np.array([0, 0, HEADS, SIZE]))
    split = add(graph, after, "Reshape", ["attended", "in_heads"], "attended.split")
    add(graph, after, "Transpose", [split], result, perm=[0, 2, 1, 3])
    return next(each for each in graph.node if each.name == "mha")


def own_past(node: onnx.NodeProto, graph: Graph) -> None:
    multi_head(node, graph)


def of_concat(node: onnx.NodeProto, graph: Graph) -> None:
    multi_head(node, graph, own_past=False)


def with_bias(node: onnx.NodeProto, graph: Graph) -> None:
    made = multi_head(node, graph)
    bias = np.random.default_rng(0).standard_normal(3 * HEADS * SIZE).astype(np.float32)
    made.input[3] = constant(graph, "bias", bias)


def causal_by_itself(node: onnx.NodeProto, graph: Graph) -> None:
    """`unidirectional` and a padding mask, as ONNX Runtime's optimizer leaves them."""
    made = multi_head(node, graph, unidirectional=1)
    made.input[5] = ""
    made.input[4] = add(graph, made, "Cast", ["attention_mask"], "padding", to=int(onnx.TensorProto.INT32))


CHANGES = (own_past, of_concat, with_bias, causal_by_itself)


@pytest.mark.parametrize("change", CHANGES)
def test_import_is_proved_against_the_original(change: Change, source: Path, tmp_path: Path):
    graph = imported(source, tmp_path, change)
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("NexusAttention") == 1 and "MultiHeadAttention" not in kinds
    said = recognised(tmp_path / "source" / "model.onnx")
    assert said is not None and said.startswith("1 x com.microsoft::MultiHeadAttention; positions: by position_ids")


def without_mask(node: onnx.NodeProto, graph: Graph) -> None:
    multi_head(node, graph).input[5] = ""


def padding_alone(node: onnx.NodeProto, graph: Graph) -> None:
    causal_by_itself(node, graph)
    (made,) = [each for each in graph.node if each.name == "mha"]
    made.attribute.remove(next(each for each in made.attribute if each.name == "unidirectional"))


def side_by_side(graph: Graph, before: onnx.NodeProto, tensors: list[str]) -> str:
    """`[B,S,H,n,D]` of n tensors `[B,S,H*D]`."""
    if not any(tensor.name == "heads_last" for tensor in graph.initializer):
        constant(graph, "heads_last", np.array([0, 0, HEADS, 1, SIZE]))
    split = [add(graph, before, "Reshape", [name, "heads_last"], f"{name}.{len(tensors)}.apart") for name in tensors]
    return add(graph, before, "Concat", split, f"packed.{len(tensors)}", axis=3)


def packed_qkv(node: onnx.NodeProto, graph: Graph) -> None:
    made = multi_head(node, graph)
    made.input[0] = side_by_side(graph, made, list(made.input[:3]))
    made.input[1] = made.input[2] = ""


def packed_kv(node: onnx.NodeProto, graph: Graph) -> None:
    made = multi_head(node, graph)
    made.input[1] = side_by_side(graph, made, list(made.input[1:3]))
    made.input[2] = ""


def shared_buffers(node: onnx.NodeProto, graph: Graph) -> None:
    multi_head(node, graph).input.append(constant(graph, "slots", np.array([5], np.int32)))


def weak_mask(node: onnx.NodeProto, graph: Graph) -> None:
    multi_head(node, graph, mask_filter_value=-1.0)


def one_cache(node: onnx.NodeProto, graph: Graph) -> None:
    made = multi_head(node, graph)
    made.input[7] = made.input[6]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_mask, "expected a mask, got none"),
        (padding_alone, "a mask that is not causal"),
        (packed_qkv, r"mha: MultiHeadAttention with QKV packed into one tensor .*got packed.3"),
        (packed_kv, r"mha: MultiHeadAttention with KV packed into one tensor .*got packed.2"),
        (shared_buffers, "of buffers that are shared by steps or beams"),
        (weak_mask, "a mask_filter_value of -10000 or less"),
        (one_cache, "a cache that nothing else reads|a cache of its own"),
    ],
)
def test_what_it_has_and_we_have_not_is_refused(change: Change, said: str, source: Path, tmp_path: Path):
    with pytest.raises(SemkvError, match=said):
        imported(source, tmp_path, change)

"""Products by quantised weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

FLOAT32_ACTIVATIONS = 1
"""MatMulNBits' `accuracy_level`; at 4 its kernels round activations to 8 bits."""

FLOAT32_BLOCKS = ("session.qdq_matmulnbits_accuracy_level", str(FLOAT32_ACTIVATIONS))
"""A session's setting. ONNX Runtime makes `MatMulNBits` of `DequantizeLinear` in blocks and `MatMul`; left alone, of
level 4, which rounds what the graph does not."""

QUANTISED = ("MatMulNBits", "MatMulInteger", "GatherBlockQuantized", "QMoE", "DequantizeLinear")
"""Operators that read quantised weights; the last where it reads an initializer."""


def reads_quantised_weights(graph: onnx.GraphProto) -> str | None:
    """The first operator that does."""
    held = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in QUANTISED and (node.op_type != "DequantizeLinear" or node.input[0] in held):
            return str(node.op_type)
    return None


def use_float32_activations(model: onnx.ModelProto) -> None:
    """In place: products take activations as they are, so that no difference in a last bit is made one of a percent.

    `MatMulNBits` by its accuracy level; `MatMulInteger` on a `DynamicQuantizeLinear` becomes a product by the same
    weights in float32; `DequantizeLinear` of a `QuantizeLinear` is left out.
    """
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    changed: set[str] = set()
    for place, node in reversed(list(enumerate(graph.node))):
        maker = makers.get(node.input[0]) if node.input else None
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = FLOAT32_ACTIVATIONS
        elif node.op_type == "MatMulInteger" and maker is not None and maker.op_type == "DynamicQuantizeLinear":
            changed.add(node.output[0])
            _replace(graph, place, _in_float32(node, maker))
        elif node.op_type == "DequantizeLinear" and maker is not None and maker.op_type == "QuantizeLinear":
            changed.add(node.output[0])
            node.op_type, node.input[:] = "Identity", [maker.input[0]]
            del node.attribute[:]
    stated = [value for value in graph.value_info if value.name not in changed]
    del graph.value_info[:]
    graph.value_info.extend(stated)


def _in_float32(product: onnx.NodeProto, rounded: onnx.NodeProto) -> list[onnx.NodeProto]:
    """What the integers of a product stand for, before they are multiplied by the activations' scale."""
    from onnx import TensorProto, helper

    name = product.output[0]
    made = [helper.make_node("Cast", [product.input[1]], [f"{name}.weights"], to=TensorProto.FLOAT)]
    weights = made[0].output[0]
    if len(product.input) > 3 and product.input[3]:
        made.append(helper.make_node("Cast", [product.input[3]], [f"{name}.zero"], to=TensorProto.FLOAT))
        made.append(helper.make_node("Sub", [weights, f"{name}.zero"], [f"{name}.centred"]))
        weights = f"{name}.centred"
    made.append(helper.make_node("MatMul", [rounded.input[0], weights], [f"{name}.product"]))
    made.append(helper.make_node("Div", [f"{name}.product", rounded.output[1]], [name]))
    return made


def _replace(graph: onnx.GraphProto, place: int, nodes: list[onnx.NodeProto]) -> None:
    del graph.node[place]
    for node in reversed(nodes):
        graph.node.insert(place, node)

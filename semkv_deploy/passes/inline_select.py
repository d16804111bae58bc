"""Puts the body of `SemanticBlockSelect` into a decoder: standard operators, static where its shapes are."""

from __future__ import annotations

import functools

import onnx_ir as ir

from semkv_deploy.graph.editing import GraphEditor, attribute, replace
from semkv_deploy.ops import DOMAIN, semantic_block_select

Shape = tuple[int | str, ...]


def inline_selection(model: ir.Model) -> list[str]:
    """Puts the bodies of a decoder's `SemanticBlockSelect` nodes in their place; returns the names of their TopK nodes.

    Args:
        model: its `NexusAttention` nodes are not yet lowered.
    """
    graph = model.graph
    edit = GraphEditor(graph, "select")
    ranked = []
    for node in [node for node in graph if node.domain == DOMAIN and node.op_type == semantic_block_select.OP.name]:
        (reader,) = (use.node for use in node.outputs[0].uses())
        ranked.append(inline_node(node, edit, f"{(reader.name or '').removesuffix('.attention')}.select"))
    return ranked


def inline_node(node: ir.Node, edit: GraphEditor, prefix: str) -> str:
    """Puts the body of one such node in its place, nodes named by `prefix`; returns the name of its TopK node."""
    attributes = (attribute(node, name, default) for name, default in semantic_block_select.OP.attributes.items())
    return _splice(node, _body(tuple(map(_form, node.inputs)), *attributes), edit, prefix)


def _form(value: ir.Value | None) -> tuple[ir.DataType, Shape]:
    assert value is not None and value.dtype is not None and value.shape is not None
    return value.dtype, tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)


@functools.cache
def _body(shapes: tuple[tuple[ir.DataType, Shape], ...], width: int, reduce_max: int) -> ir.Graph:
    """The operator's body for inputs of these types and shapes, what follows from sizes that are numbers computed."""
    import onnx.inliner
    from onnxscript.optimizer import optimize

    spec = semantic_block_select.OP
    inputs = [
        onnx.helper.make_tensor_value_info(of.name, int(element), list(shape))
        for of, (element, shape) in zip(spec.inputs, shapes, strict=True)
    ]
    output = onnx.helper.make_tensor_value_info("slot_index", onnx.TensorProto.INT64, None)
    node = onnx.helper.make_node(
        spec.name, [each.name for each in inputs], ["slot_index"], domain=DOMAIN, width=width, reduce_max=reduce_max
    )
    body = semantic_block_select.function_proto()
    opsets = [onnx.helper.make_opsetid(DOMAIN, 1), *body.opset_import]
    graph = onnx.helper.make_graph([node], "select", inputs, [output])
    proto = onnx.helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)
    model = ir.from_proto(onnx.inliner.inline_local_functions(proto))
    optimize(model, num_iterations=3)
    return model.graph


def _splice(node: ir.Node, body: ir.Graph, edit: GraphEditor, prefix: str) -> str:
    """Copies a body before a node that it replaces; returns the name of its TopK node."""
    assert isinstance(node.graph, ir.Graph)
    known: dict[ir.Value | None, ir.Value | None] = {None: None}
    known |= dict(zip(body.inputs, node.inputs, strict=True))
    for value in body.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        known[value] = edit.constant(array, array.dtype)
    ranked = ""
    for number, inner in enumerate(body):
        name = f"{prefix}.{inner.op_type}_{number}"
        ranked = name if inner.op_type == "TopK" else ranked
        copy = ir.Node(
            inner.domain,
            inner.op_type,
            [known[value] for value in inner.inputs],
            list(inner.attributes.values()),
            num_outputs=len(inner.outputs),
            name=name,
        )
        for index, (old, new) in enumerate(zip(inner.outputs, copy.outputs, strict=True)):
            new.name, new.shape, new.type = f"{name}:{index}", old.shape, old.type
            known[old] = new
        node.graph.insert_before(node, copy)
    result = known[body.outputs[0]]
    assert result is not None
    replace(node, [result])
    return ranked

"""Float16 graphs as float32: the same weights, kept exactly, and no rounding between nodes.

Rules, passes and budgets are stated for float32; every target's own precision comes after them. So a graph in float16
is read in float32 before anything looks at it. It is compared with what it was: `proof.check_widened`. Converters the
other way abound; one back is in no package that is kept and light (AMD Quark's wants all of Quark).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.inference import infer_types

if TYPE_CHECKING:
    from collections.abc import Iterator

_TYPES = ("to", "dtype", "output_dtype", "softmax_precision")
"""Attributes that are an element type."""


def is_float16(model: ir.Model) -> bool:
    """Whether a decoder's caches, weights or logits are float16."""
    return any(value.dtype == ir.DataType.FLOAT16 for value in _values(model))


def widen(model: ir.Model, where: str) -> None:
    """Turns every float16 of a model into float32, in place; weights are read when they are asked for.

    A Cast that only changed between the two is gone, where the graph states or implies its input's type.

    Raises:
        SemkvError: for functions of the model's own, in which types are not stated.
    """
    if model.functions:
        names = sorted(function.name for function in model.functions.values())
        raise SemkvError(
            "a float16 graph with functions of its own",
            where=where,
            got=names,
            fix="inline them: onnx.inliner.inline_local_functions",
        )
    for value in _values(model):
        if value.dtype == ir.DataType.FLOAT16:
            value.dtype = ir.DataType.FLOAT
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT16:
            value.const_value = _widened(tensor)
    for node in model.graph.all_nodes():
        for name, given in list(node.attributes.items()):
            if given.type == ir.AttributeType.TENSOR and given.value.dtype == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _widened(given.value))
            elif name in _TYPES and given.value == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    infer_types(model)
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Cast" and node.attributes["to"].value == ir.DataType.FLOAT:
            _without(node)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Inputs, weights and what nodes make, subgraphs' too."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """In float32, made when it is asked for."""

    def read() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().astype("float32"), name=tensor.name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _without(cast: ir.Node) -> None:
    """Takes out a Cast from float32 to float32; one between a graph's input and its output stays."""
    source, result = cast.inputs[0], cast.outputs[0]
    if source is None or source.dtype != ir.DataType.FLOAT:
        return
    if result.is_graph_output():
        if source.producer() is None or source.is_graph_output():
            return
        result.name, source.name = None, result.name
        source.shape = result.shape
    ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
    graph = cast.graph
    assert isinstance(graph, ir.Graph)
    graph.remove(cast, safe=True)

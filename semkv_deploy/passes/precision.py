"""A float32 decoder in float16 or bfloat16, strongly typed: what TensorRT is given.

Matrix products, attention and the caches take the new type. Norms and rotary embeddings stay in float32 up to the
next product (squares overflow float16, and angles of late positions need the mantissa), and so do slot biases.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.model import names
from semkv_deploy.ops import DOMAIN

if TYPE_CHECKING:
    from semkv_deploy.choices import DType

ELEMENT: dict[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}

_KEPT = {
    "Pow",
    "ReduceMean",
    "ReduceL2",
    "Sqrt",
    "Reciprocal",
    "Cos",
    "Sin",
    "LayerNormalization",
    "RMSNormalization",
}
"""Operators that compute in float32, with everything between them and the next product."""

_PRODUCTS = {"MatMul", "Gemm", "NexusAttention", "Gather"}
"""Operators that compute in the new type, whatever they are fed."""


def convert_floats(model: ir.Model, dtype: DType) -> None:
    """Rewrites a decoder (operators of domain `semkv` in it, their functions removed) in place.

    `slot_bias` inputs and the `logits` output stay float32. Weights are converted when they are written.

    Raises:
        SemkvError: when a float graph input or operator of the `semkv` domain is not known.
    """
    if dtype == "float32":
        return
    graph, element = model.graph, ELEMENT[dtype]
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT and not names.is_slot_bias(value.name):
            value.dtype = element
    for value in graph.outputs:
        if names.is_cache_output(value.name):
            value.dtype = element
    wide: set[ir.Node] = set()
    for node in graph:
        if _in_float32(node, wide):
            wide.add(node)
    conversions = _Conversions(graph, element)
    for node in list(graph):
        if node.domain not in ("", DOMAIN):
            raise SemkvError(
                "an operator of a foreign domain has no precision rule",
                where=node.name,
                expected="standard operators",
                got=f"{node.domain}::{node.op_type}",
                fix="build for onnxruntime-cpu, or with --dtype float32 where TensorRT has the operator",
            )
        wanted = ir.DataType.FLOAT if node in wide else element
        for index, source in enumerate(node.inputs):
            if source is None or source.dtype not in (ir.DataType.FLOAT, element) or _stays(node, index):
                continue
            if source.dtype != wanted:
                node.replace_input_with(index, conversions.of(source, wanted, node))
        for output in node.outputs:
            if output.dtype in (ir.DataType.FLOAT, element):
                output.dtype = wanted
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.FLOAT and node not in wide:
            node.attributes["to"] = ir.AttrInt64("to", int(element))
    _keep_output_type(graph)


def _in_float32(node: ir.Node, wide: set[ir.Node]) -> bool:
    if node.op_type in _KEPT or node.domain == DOMAIN:
        return node.domain != DOMAIN
    if node.op_type in _PRODUCTS:
        return False
    source = [value.dtype for value in node.inputs if value is not None]
    if node.op_type == "Cast" and source and source[0] is not None and not source[0].is_floating_point():
        return True
    return any(value is not None and value.producer() in wide for value in node.inputs)


def _stays(node: ir.Node, index: int) -> bool:
    """Whether an input keeps its own type: the slot biases of attention."""
    value = node.inputs[index]
    return node.domain == DOMAIN and value is not None and names.is_slot_bias(value.name)


def _keep_output_type(graph: ir.Graph) -> None:
    """`logits` leave in float32."""
    for index, value in enumerate(graph.outputs):
        if value.name != "logits" or value.dtype == ir.DataType.FLOAT:
            continue
        producer = value.producer()
        assert producer is not None
        value.name = "logits.narrow"
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name="logits/Cast")
        cast.outputs[0].name, cast.outputs[0].shape = "logits", value.shape
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_after(producer, cast)
        graph.outputs[index] = cast.outputs[0]


class _Conversions:
    """Values in another type: weights as converted weights, the rest through one Cast each."""

    def __init__(self, graph: ir.Graph, element: ir.DataType) -> None:
        self._graph, self._element = graph, element
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        key = (value, wanted)
        if key not in self._made:
            self._made[key] = (
                self._weight(value, wanted) if value.is_initializer() else self._cast(value, wanted, before)
            )
        return self._made[key]

    def _cast(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        name = f"{value.name}/{wanted.name.lower()}"
        cast = ir.node("Cast", [value], {"to": int(wanted)}, name=name)
        cast.outputs[0].name, cast.outputs[0].shape = name, value.shape
        cast.outputs[0].type = ir.TensorType(wanted)
        self._graph.insert_before(before, cast)
        return cast.outputs[0]

    def _weight(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None
        name = f"{value.name}/{wanted.name.lower()}"
        converted = ir.Value(name=name, shape=value.shape, type=ir.TensorType(wanted))
        converted.const_value = ir.LazyTensor(
            functools.partial(_converted, tensor, wanted, name),
            dtype=wanted,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
        )
        self._graph.register_initializer(converted)
        return converted


def _converted(tensor: ir.TensorProtocol, wanted: ir.DataType, name: str) -> ir.Tensor:
    array = tensor.numpy()
    with np.errstate(over="ignore"):
        converted = array.astype(wanted.numpy())
    if not np.isfinite(converted.astype(np.float32)).all() and np.isfinite(array).all():
        raise SemkvError(
            f"a weight does not fit {wanted.name.lower()}",
            where=name,
            expected=f"at most {np.finfo(np.float16).max:g}",
            got=f"{np.abs(array).max():g}",
            fix="use --dtype bfloat16",
        )
    return ir.Tensor(converted, dtype=wanted)

"""Keeps `semkv::NexusAttention` for the native operators of ONNX Runtime, with caches of the type that is wanted."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import GraphEditor, attribute, replace
from semkv_deploy.methods.attention_nodes import drop_slot_biases, is_indexed, require_plain, required_attention_nodes
from semkv_deploy.methods.base import BiasMode
from semkv_deploy.model import names
from semkv_deploy.ops import DOMAIN
from semkv_deploy.ops.nexus_attention import OP

if TYPE_CHECKING:
    from semkv_deploy.choices import CacheType

CACHE_ELEMENT: dict[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
}

PARTS = ("key", "value")


def keep_as_native(model: ir.Model, *, bias: BiasMode, cache_dtype: CacheType, kept: Collection[str] = ()) -> int:
    """Gives every `NexusAttention` its native form, in place; returns how many there were.

    Queries and new rows stay float32: the operator rounds rows when it appends them. With int8 caches every group gets
    two more inputs and outputs, its scales.

    Args:
        bias: what the method promises of slot biases; with "none" the `slot_bias` inputs go away.
        kept: other operators that are native: their bodies go.

    Raises:
        SemkvError: when the graph has none.
    """
    graph = model.graph
    nodes = required_attention_nodes(graph)
    edit = GraphEditor(graph, "native")
    zeros: dict[object, ir.Value] = {}
    for number, node in enumerate(nodes):
        indexed = is_indexed(node)
        if not indexed:
            require_plain(node)
        inputs = list(node.inputs)
        if bias == "none":
            inputs[5] = _zeros(node, edit, zeros)
        scales = []
        for part, cache, result in zip(PARTS, inputs[3:5], node.outputs[1:3], strict=True):
            if cache not in graph.inputs or result not in graph.outputs or cache is None:
                raise SemkvError("a cache is no input and output of the graph", where=node.name, got=part)
            for value in (cache, result):
                value.dtype = CACHE_ELEMENT[cache_dtype]
            if cache_dtype == "int8":
                assert cache.shape is not None
                name = names.decoder_input(f"{part}_scale", number, len(nodes))
                scale = ir.Value(name=name, shape=ir.Shape(cache.shape[:3]), type=ir.TensorType(ir.DataType.FLOAT))
                graph.inputs.append(scale)
                scales.append(scale)
        plain = OP.attributes
        native = edit.node(
            node,
            "_".join(["NexusAttention", *(["indexed"] if indexed else []), *(["int8"] if scales else [])]),
            [*inputs, *scales],
            domain=DOMAIN,
            outputs=3 + len(scales),
            name=node.name,
            **{name: attribute(node, name, default) for name, default in plain.items()},
        )
        for part, scale, result in zip(PARTS, scales, native[3:], strict=False):
            result.name = names.decoder_output(f"{part}_scale", number, len(nodes))
            result.shape, result.type = scale.shape, scale.type
            graph.outputs.append(result)
        if cache_dtype != "float32":
            for position in (1, 2):
                _widen_for_readers(node.outputs[position], native[position], native[2 + position] if scales else None)
        node.name = f"{node.name}.portable"
        native[0].shape, native[0].type = node.outputs[0].shape, node.outputs[0].type
        replace(node, native[:3])
    for key in [key for key in model.functions if key[0] == DOMAIN and key[1] in ("NexusAttention", *kept)]:
        del model.functions[key]
    model.opset_imports[DOMAIN] = 1
    if bias == "none":
        drop_slot_biases(graph)
    return len(nodes)


def _widen_for_readers(cache: ir.Value, narrow: ir.Value, scale: ir.Value | None) -> None:
    """Float32 rows for nodes beside the attention that read its cache, each in its own graph: a branch may not run.

    Args:
        cache: output of the attention that is replaced.
        narrow, scale: the native operator's; scale None: rows are only cast.
    """
    for reader, index in list(cache.uses()):
        graph = reader.graph
        assert isinstance(graph, ir.Graph)
        edit = GraphEditor(graph, f"{reader.name}.widened")
        (rows,) = edit.node(reader, "Cast", [narrow], to=int(ir.DataType.FLOAT))
        if scale is not None:
            (steps,) = edit.node(reader, "Unsqueeze", [scale, edit.constant([-1], np.int64)])
            (rows,) = edit.node(reader, "Mul", [rows, steps])
        reader.replace_input_with(index, rows)


def _zeros(node: ir.Node, edit: GraphEditor, made: dict[object, ir.Value]) -> ir.Value:
    """Biases of a group of this shape when they are all zero; groups of one shape share them."""
    bias = node.inputs[5]
    assert bias is not None and bias.shape is not None
    key = tuple(size.value if isinstance(size, ir.SymbolicDim) else size for size in bias.shape)
    if key not in made:
        (rows,) = edit.node(node, "Shape", [node.inputs[3]], start=0, end=3)
        zero = ir.tensor(np.zeros(1, np.float32))
        (made[key],) = edit.node(node, "ConstantOfShape", [rows], value=zero)
    return made[key]

"""Splits a portable decoder's attention into cache groups: one `NexusAttention` for each, on its heads and buffers.

An exported decoder has one group a layer. Heads never meet inside attention, so that a layer's output is its groups'
outputs side by side, and what is built from the result holds for groups as it does for layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import GraphEditor, static
from semkv_deploy.methods.attention_nodes import attention_nodes, require_plain
from semkv_deploy.model import names
from semkv_deploy.model.cache_groups import CacheGroup

_HEADS = 1
"""Axis of the heads in `[B,H,S,D]`."""


def split_groups(model: ir.Model, groups: Sequence[CacheGroup]) -> None:
    """Gives every group its own node, buffers, capacity symbol and entry of `length`, in place.

    Args:
        model: a portable decoder with one `NexusAttention` a layer.
        groups: in the order of their numbers; together they are all KV heads of all layers.

    Raises:
        SemkvError: when the graph does not have the groups' layers.
    """
    graph = model.graph
    nodes = attention_nodes(graph)
    if sorted({group.layer for group in groups}) != list(range(len(nodes))):
        raise SemkvError(
            "the groups are of other layers than the graph's",
            where=graph.name,
            expected=f"layers 0 to {len(nodes) - 1}",
            got=sorted({group.layer for group in groups}),
        )
    length = next(value for value in graph.inputs if value.name == names.LENGTH)
    assert length.shape is not None
    edit = GraphEditor(graph, "groups")
    # What goes and what comes would have one name for a moment.
    for value in (*graph.inputs, *graph.outputs):
        if names.is_cache_input(value.name) or names.is_cache_output(value.name) or names.is_slot_bias(value.name):
            value.name = f"layer.{value.name}"
    inputs: list[ir.Value] = []
    outputs: list[ir.Value] = []
    for layer, node in enumerate(nodes):
        numbered = [(number, group) for number, group in enumerate(groups) if group.layer == layer]
        new_inputs, new_outputs = _split(node, edit, numbered, len(groups), length)
        inputs += new_inputs
        outputs += new_outputs
    graph.inputs[:] = [value for value in graph.inputs if not (value.name or "").startswith("layer.")] + inputs
    graph.outputs[:] = [value for value in graph.outputs if not (value.name or "").startswith("layer.")] + outputs
    length.shape = ir.Shape([len(groups), *list(length.shape)[1:]])
    # What read the layers' lengths is read by nothing now.
    common_passes.RemoveUnusedNodesPass()(model)


def _split(
    node: ir.Node, edit: GraphEditor, groups: list[tuple[int, CacheGroup]], count: int, length: ir.Value
) -> tuple[list[ir.Value], list[ir.Value]]:
    """Replaces one layer's node; returns the new cache inputs and outputs."""
    require_plain(node)
    query, key, value, key_cache = node.inputs[:4]
    assert query is not None and key is not None and value is not None and key_cache is not None and key_cache.shape
    kv_heads = static(key_cache, _HEADS)
    per_head = static(query, _HEADS) // kv_heads
    order = [head for _, group in groups for head in group.heads]
    parts = []
    for tensor, width in ((query, per_head), (key, 1), (value, 1)):
        heads_of = [[head * width + i for head in group.heads for i in range(width)] for _, group in groups]
        parts.append(_parts(node, edit, tensor, heads_of))
    inputs: list[ir.Value] = []
    outputs: list[ir.Value] = []
    attended = []
    batch, dim, element = key_cache.shape[0], key_cache.shape[3], key_cache.dtype
    assert element is not None
    prefix = node.name or ""
    node.name = f"{prefix}.split"
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    for place, (number, group) in enumerate(groups):
        shape = [batch, len(group.heads), ir.SymbolicDim(group.symbol), dim]
        cache_types = ((shape, element), (shape, element), (shape[:3], ir.DataType.FLOAT))
        buffers = [
            ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(dtype))
            for name, (sizes, dtype) in zip(names.cache_names(number, count), cache_types, strict=True)
        ]
        live = edit.node(node, "Gather", [length, edit.constant(number, np.int64)], axis=0)[0]
        live.shape, live.type = ir.Shape([batch]), ir.TensorType(ir.DataType.INT64)
        name = prefix if len(groups) == 1 else f"{prefix.removesuffix('.attention')}.group.{number}.attention"
        result = edit.node(
            node,
            node.op_type,
            [parts[0][place], parts[1][place], parts[2][place], *buffers, live],
            domain=node.domain,
            outputs=3,
            name=name,
            **attributes,
        )
        result[0].shape, result[0].type = parts[0][place].shape, query.type
        for appended, name in zip(result[1:], names.present_names(number, count), strict=True):
            appended.name, appended.shape, appended.type = name, ir.Shape(shape), ir.TensorType(element)
        attended.append(result[0])
        inputs += buffers
        outputs += result[1:]
    joined = attended[0] if len(attended) == 1 else edit.node(node, "Concat", attended, axis=_HEADS)[0]
    if order != sorted(order):
        # Back into the order of the output projection's inputs.
        heads = [head * per_head + i for head in order for i in range(per_head)]
        back = edit.constant(np.argsort(heads), np.int64)
        joined = edit.node(node, "Gather", [joined, back], axis=_HEADS)[0]
    joined.shape, joined.type = node.outputs[0].shape, query.type
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    old = node.outputs[1:]
    graph.outputs[:] = [value for value in graph.outputs if value not in old]
    ir.convenience.replace_all_uses_with(node.outputs[0], joined)
    graph.remove(node, safe=True)
    return inputs, outputs


def _parts(node: ir.Node, edit: GraphEditor, tensor: ir.Value, heads: list[list[int]]) -> list[ir.Value]:
    """`tensor` `[B,H,S,D]` cut into groups of its heads, each in rising order."""
    assert tensor.shape is not None
    if len(heads) == 1:
        return [tensor]
    flat = [head for group in heads for head in group]
    if flat == sorted(flat):
        sizes = edit.constant([len(group) for group in heads], np.int64)
        parts = edit.node(node, "Split", [tensor, sizes], outputs=len(heads), axis=_HEADS)
    else:
        parts = [edit.node(node, "Gather", [tensor, edit.constant(group, np.int64)], axis=_HEADS)[0] for group in heads]
    for part, group in zip(parts, heads, strict=True):
        part.shape = ir.Shape([tensor.shape[0], len(group), *list(tensor.shape)[2:]])
        part.type = tensor.type
    return parts

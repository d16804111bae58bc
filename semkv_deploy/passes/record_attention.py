"""Lets a portable decoder write down how much its queries look at each slot; for calibration, not for bundles.

Every `NexusAttention` gets a buffer more: `slot_attention` `[B,Hkv,C]` float32, in and out. A run raises the value of
each live slot to the largest softmax weight that any of the run's rows, in any query head of the slot's KV head, gives
it. The softmax is over the slots below `length` alone: what a run appends takes no part. (KVzip's score, arXiv
2505.23416, when the rows are those of a text that the cache already holds.)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from semkv_deploy.graph.editing import GraphEditor, attribute, static
from semkv_deploy.model.names import TAG, number_tag
from semkv_deploy.passes.attention_nodes import require_plain, required_attention_nodes

SLOT_ATTENTION = "slot_attention"
"""The buffer's name; the graph's inputs are `slot_attention.{group}`."""

INPUT, OUTPUT = f"{SLOT_ATTENTION}.{TAG}", f"{SLOT_ATTENTION}_out.{TAG}"


def record_attention(model: ir.Model) -> None:
    """Adds a `slot_attention` input and output for every cache group, in place.

    Args:
        model: a portable decoder. Windows are ignored: in such layers what is recorded means nothing.

    Raises:
        SemkvError: when it has no `NexusAttention`, or one with options.
    """
    graph = model.graph
    nodes = required_attention_nodes(graph)
    edit = GraphEditor(graph, "record")
    for number, node in enumerate(nodes):
        require_plain(node)
        _record(graph, node, edit, number_tag(number, len(nodes)))


def _record(graph: ir.Graph, node: ir.Node, edit: GraphEditor, tag: str) -> None:
    query, length, cache = node.inputs[0], node.inputs[6], node.inputs[3]
    # What was appended is in the output; the input may be the same memory, and written by then.
    keys = node.outputs[1]
    assert query is not None and length is not None and cache is not None and cache.shape is not None
    kv_heads, head_dim = static(cache, 1), static(cache, 3)
    shape = ir.Shape([cache.shape[0], kv_heads, cache.shape[2]])
    before, after = (
        ir.Value(name=name.replace(TAG, tag), shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        for name in (INPUT, OUTPUT)
    )
    # Behind the node: before the first that reads its output.
    end = next(iter(node.outputs[0].uses())).node

    def add(op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return edit.node(end, op_type, list(inputs), **attributes)[0]

    def ints(*values: int) -> ir.Value:
        return edit.constant(values, np.int64)

    float32 = int(ir.DataType.FLOAT)
    # Rows of all query heads of a KV head in one axis: [B,Hkv,G*S,D].
    rows = add("Reshape", add("Cast", query, to=float32), ints(0, kv_heads, -1, head_dim))
    scale = attribute(node, "scale", 0.0) or 1 / math.sqrt(head_dim)
    logits = add("MatMul", rows, add("Transpose", add("Cast", keys, to=float32), perm=[0, 1, 3, 2]))
    logits = add("Mul", logits, edit.constant(scale, np.float32))
    softcap = attribute(node, "softcap", 0.0)
    if softcap > 0:
        cap = edit.constant(softcap, np.float32)
        logits = add("Mul", add("Tanh", add("Div", logits, cap)), cap)
    capacity = add("Squeeze", edit.node(end, "Shape", [keys], start=2, end=3)[0])
    slot = add("Range", edit.constant(0, np.int64), capacity, edit.constant(1, np.int64))
    live = add("Less", slot, add("Unsqueeze", length, ints(1, 2, 3)))
    # Finite, so that a run on an empty cache gives equal weights and no NaN.
    weights = add("Softmax", add("Where", live, logits, edit.constant(-1e30, np.float32)), axis=-1)
    largest = edit.node(end, "ReduceMax", [weights, ints(2)], keepdims=0)[0]
    result = add("Max", before, largest)
    result.name, result.shape, result.type = after.name, after.shape, after.type
    graph.inputs.append(before)
    graph.outputs.append(result)

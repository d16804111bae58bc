"""Lowers `semkv::NexusAttention` to `com.microsoft::GroupQueryAttention` (ONNX Runtime).

Caches are appended in place when the caller binds each to the node's input and output alike. Facts of the kernel that
shape this (onnxruntime 1.32, CPU):

* `query_seqlens` lifts "batch_size must be 1 when sequence_length > 1 and past context is given", and makes
  `total_sequence_length` a mere bound, so that it can be the static capacity.
* `attention_bias` is `[B, 1 or Hq, S, C]`; the kernel masks causally by itself and reads nothing past a row's length.
* `local_window_size` w shows w tokens, as our `window` does.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from semkv_deploy.graph.editing import GraphEditor, attribute, replace, sole, static
from semkv_deploy.methods.attention_nodes import capacity_of, drop_slot_biases, require_plain, required_attention_nodes
from semkv_deploy.methods.base import BiasMode
from semkv_deploy.ops import DOMAIN

_HEADS_LAST = [0, 2, 1, 3]


def lower_to_gqa(model: ir.Model, *, bias: BiasMode) -> int:
    """Replaces every `NexusAttention` in place; returns how many there were.

    Args:
        bias: what the method promises of slot biases; with "none" the `slot_bias` inputs go away.

    Raises:
        SemkvError: when the graph has none.
    """
    graph = model.graph
    nodes = required_attention_nodes(graph)
    edit = GraphEditor(graph, "gqa")
    rows = _SharedRows(edit, nodes[0])
    shared: dict[object, _SharedInputs] = {}
    for node in nodes:
        # Groups of one capacity share what is made of it.
        capacity = capacity_of(node)
        if capacity not in shared:
            shared[capacity] = _SharedInputs(edit, node, rows)
        _lower(node, edit, shared[capacity], bias)
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports["com.microsoft"] = 1
    if bias == "none":
        drop_slot_biases(graph)
    return len(nodes)


class _SharedRows:
    """What all nodes read of a run's size, computed once."""

    def __init__(self, edit: GraphEditor, first: ir.Node) -> None:
        value, key_cache = first.inputs[2], first.inputs[3]
        assert value is not None
        rows = _joined_heads(value)
        # Whatever the attention takes from the projection, so that no split into heads stays only for its shape.
        axis = 2 if rows is None else 1
        self.rows_1 = edit.node(first, "Shape", [value if rows is None else rows], start=axis, end=axis + 1)[0]
        self.batch_1 = edit.node(first, "Shape", [key_cache], start=0, end=1)[0]
        rows_per_batch = edit.node(first, "Expand", [self.rows_1, self.batch_1])[0]
        self.query_seqlens = edit.node(first, "Cast", [rows_per_batch], to=int(ir.DataType.INT32))[0]
        self.last_row = edit.node(first, "Sub", [self.rows_1, edit.constant([1], np.int64)])[0]


class _SharedInputs:
    """What all nodes of one capacity read, computed once."""

    def __init__(self, edit: GraphEditor, first: ir.Node, rows: _SharedRows) -> None:
        self.rows_1, self.batch_1 = rows.rows_1, rows.batch_1
        self.query_seqlens, self.last_row = rows.query_seqlens, rows.last_row
        self.capacity_1 = edit.node(first, "Shape", [first.inputs[3]], start=2, end=3)[0]
        capacity = edit.node(first, "Squeeze", [self.capacity_1])[0]
        self.capacity = edit.node(first, "Cast", [capacity], to=int(ir.DataType.INT32))[0]
        zero, step = edit.constant(0, np.int64), edit.constant(1, np.int64)
        slot = edit.node(first, "Range", [zero, capacity, step])[0]
        self.slot = edit.node(first, "Unsqueeze", [slot, edit.constant([0, 1], np.int64)])[0]


def _lower(node: ir.Node, edit: GraphEditor, shared: _SharedInputs, bias: BiasMode) -> None:
    require_plain(node)
    query, key, value, key_cache, value_cache, _, length = node.inputs
    assert query is not None and key is not None and value is not None and key_cache is not None
    kv_heads, head_dim = static(key_cache, 1), static(key_cache, 3)
    heads = static(query, 1)
    last = edit.node(node, "Add", [length, shared.last_row])[0]
    seqlens = edit.node(node, "Cast", [last], to=int(ir.DataType.INT32))[0]
    attention_bias = None
    if bias != "none":
        attention_bias = _attention_bias(node, edit, shared, bias, heads, kv_heads)
    inputs = [
        _as_rows(query, heads, head_dim, node, edit),
        _as_rows(key, kv_heads, head_dim, node, edit),
        _as_rows(value, kv_heads, head_dim, node, edit),
        key_cache,
        value_cache,
        seqlens,
        shared.capacity,
        *[None] * 3,
        attention_bias,
        *[None] * 5,
        # Refused by the kernel where nothing is masked: there, several rows need a batch of one.
        shared.query_seqlens if attribute(node, "causal", 1) else None,
    ]
    window = attribute(node, "window", 0)
    output, key_out, value_out = edit.node(
        node,
        "GroupQueryAttention",
        inputs,
        domain="com.microsoft",
        outputs=3,
        name=node.name,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=attribute(node, "scale", 0.0),
        softcap=attribute(node, "softcap", 0.0),
        causal=attribute(node, "causal", 1),
        local_window_size=window if window > 0 else -1,
    )
    node.name = f"{node.name}.lowered"
    # The operator's output has heads before rows, the kernel's is already [B,S,Hq*D].
    shape = edit.constant([0, 0, heads, head_dim], np.int64)
    split = edit.node(node, "Reshape", [output, shape])[0]
    heads_first = edit.node(node, "Transpose", [split], perm=_HEADS_LAST)[0]
    replace(node, [heads_first, key_out, value_out])


def _as_rows(value: ir.Value, heads: int, head_dim: int, node: ir.Node, edit: GraphEditor) -> ir.Value:
    """`[B,S,H*D]` from `[B,H,S,D]`, taking back the split into heads where that is how the value was made."""
    rotary = sole(value, "RotaryEmbedding")
    if rotary is not None and rotary.inputs[0] is not None:
        rows = _joined_heads(rotary.inputs[0])
        if rows is not None:
            return edit.node(node, "RotaryEmbedding", [rows, *rotary.inputs[1:]], num_heads=heads)[0]
    rows = _joined_heads(value)
    if rows is not None:
        return rows
    last = edit.node(node, "Transpose", [value], perm=_HEADS_LAST)[0]
    return edit.node(node, "Reshape", [last, edit.constant([0, 0, heads * head_dim], np.int64)])[0]


def _joined_heads(value: ir.Value) -> ir.Value | None:
    """The `[B,S,H*D]` behind `Transpose(Reshape(x))`, when that is what `value` is."""
    transpose = sole(value, "Transpose")
    if transpose is None or list(attribute(transpose, "perm", [])) != _HEADS_LAST:
        return None
    reshape = sole(transpose.inputs[0], "Reshape")
    if reshape is None or reshape.inputs[0] is None or reshape.inputs[0].shape is None:
        return None
    return reshape.inputs[0] if len(reshape.inputs[0].shape) == 3 else None


def _attention_bias(
    node: ir.Node, edit: GraphEditor, shared: _SharedInputs, bias: BiasMode, heads: int, kv_heads: int
) -> ir.Value:
    """`[B, 1 or Hq, S, C]`: the bias of live slots, 0 for new rows whatever the buffer holds there."""
    slot_bias, length = node.inputs[5], node.inputs[6]
    if bias == "group":
        ends = [edit.constant([bound], np.int64) for bound in (0, 1, 1)]
        slot_bias = edit.node(node, "Slice", [slot_bias, *ends])[0]
    old = edit.node(node, "Unsqueeze", [length, edit.constant([1, 2], np.int64)])[0]
    is_old = edit.node(node, "Less", [shared.slot, old])[0]
    live = edit.node(node, "Where", [is_old, slot_bias, edit.constant(0.0, np.float32)])[0]
    one = edit.constant([1], np.int64)
    row_axis = edit.node(node, "Unsqueeze", [live, edit.constant([2], np.int64)])[0]
    if bias == "group":
        shape = edit.node(node, "Concat", [shared.batch_1, one, shared.rows_1, shared.capacity_1], axis=0)[0]
        return edit.node(node, "Expand", [row_axis, shape])[0]
    group_axis = edit.node(node, "Unsqueeze", [row_axis, edit.constant([2], np.int64)])[0]
    kv, group = edit.constant([kv_heads], np.int64), edit.constant([heads // kv_heads], np.int64)
    shape = edit.node(node, "Concat", [shared.batch_1, kv, group, shared.rows_1, shared.capacity_1], axis=0)[0]
    grouped = edit.node(node, "Expand", [group_axis, shape])[0]
    query_heads = edit.constant([heads], np.int64)
    flat = edit.node(node, "Concat", [shared.batch_1, query_heads, shared.rows_1, shared.capacity_1], axis=0)[0]
    return edit.node(node, "Reshape", [grouped, flat])[0]

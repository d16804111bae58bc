"""Rule for `com.microsoft::GroupQueryAttention`: packed or separate QKV, rotary inside or outside, soft cap, window.

A compressed cache has slots that are no positions, while the node turns keys by their place in its cache: rotary
inside it comes out, and turns by the graph's position_ids.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from semkv_deploy import ops
from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import GraphEditor, attribute, sole
from semkv_deploy.ops import nexus_attention as nexus

_OFF = {
    "smooth_softmax": (0, -1),
    "k_quant_type": ("NONE", b"NONE"),
    "v_quant_type": ("NONE", b"NONE"),
    "kv_cache_bit_width": (0,),
    "qk_output": (0,),
    "causal": (1,),
}
"""Attributes whose other values NexusAttention does not have, and the values that are off."""

_KNOWN = {"num_heads", "kv_num_heads", "scale", "local_window_size", "softcap", "do_rotary", "rotary_interleaved"}


def check_node(node: ir.Node, mask: ir.Value | None) -> None:
    """Compares a node with what the rule takes.

    Raises:
        SemkvError: naming the node and the first difference.
    """

    def differs(what: str, expected: object, got: object) -> SemkvError:
        return SemkvError(f"GroupQueryAttention with {what}", where=node.name, expected=expected, got=got)

    for name, value in node.attributes.items():
        if name in _OFF and value.value not in _OFF[name]:
            raise differs(name, _OFF[name][0], value.value)
        if name not in _OFF and name not in _KNOWN:
            raise differs("an attribute that is not known", sorted(_KNOWN), name)
    if attribute(node, "rotary_interleaved", 0):
        raise differs("interleaved rotary", 0, 1)
    for index, more in enumerate(node.inputs[9:], start=9):
        if more is not None:
            raise differs(f"input {index} (positions, attention bias, sinks or scales)", "none", more.name)
    if len(node.outputs) > 3 and node.outputs[3].uses():
        raise differs("its products as an output", "none", node.outputs[3].name)
    if attribute(node, "do_rotary", 0) and any(value is None for value in (*node.inputs[7:9], *node.inputs[6:7])):
        raise differs("rotary but no tables", "cos_cache and sin_cache", "none")
    if not _counts_mask(node.inputs[5], mask):
        raise differs("seqlens_k of another origin", "ReduceSum(attention_mask) - 1", _name(node.inputs[5]))
    if not _width_of_mask(node.inputs[6], mask):
        raise differs("total_sequence_length of another origin", "Shape(attention_mask)[1]", _name(node.inputs[6]))


def _name(value: ir.Value | None) -> str | None:
    return None if value is None else value.name


def _constant(value: ir.Value | None) -> object:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy().reshape(-1).tolist()


def _counts_mask(value: ir.Value | None, mask: ir.Value | None) -> bool:
    cast = sole(value, "Cast")
    less = sole(cast.inputs[0] if cast else value, "Sub")
    total = sole(less.inputs[0], "ReduceSum") if less and _constant(less.inputs[1]) == [1] else None
    return total is not None and mask is not None and total.inputs[0] is mask and _constant(total.inputs[1]) == [1]


def _width_of_mask(value: ir.Value | None, mask: ir.Value | None) -> bool:
    cast = sole(value, "Cast")
    one = sole(cast.inputs[0] if cast else value, "Gather")
    shape = sole(one.inputs[0], "Shape") if one and _constant(one.inputs[1]) == [1] else None
    return shape is not None and mask is not None and shape.inputs[0] is mask


class Tables:
    """Rows of rotary tables `[P,D/2]` at the graph's positions, as `[B,1,S,D]`; made once for each table."""

    def __init__(self, edit: GraphEditor, first: ir.Node, positions: ir.Value) -> None:
        self._edit, self._first, self._positions = edit, first, positions
        self._rows: dict[ir.Value, ir.Value] = {}

    def rows(self, table: ir.Value) -> ir.Value:
        if table not in self._rows:
            edit, first = self._edit, self._first
            half = edit.node(first, "Gather", [table, self._positions], axis=0)[0]
            whole = edit.node(first, "Concat", [half, half], axis=-1)[0]
            self._rows[table] = edit.node(first, "Unsqueeze", [whole, edit.constant([1], np.int64)])[0]
        return self._rows[table]


def replace_node(
    node: ir.Node, edit: GraphEditor, tables: Tables, head_dim: int, bias: ir.Value, length: ir.Value
) -> None:
    """Puts a NexusAttention in the place of a checked node; its caches stay those of the node.

    Args:
        bias: slot_bias of the layer, `[B,Hkv,C]`.
        length: of the layer, `[B]`.

    Raises:
        SemkvError: when rotary turns a part of a head only.
    """
    heads, kv_heads = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    query, key, value = node.inputs[:3]
    if key is None:
        sizes = edit.constant([count * head_dim for count in (heads, kv_heads, kv_heads)], np.int64)
        query, key, value = edit.node(node, "Split", [query, sizes], outputs=3, axis=-1)
    assert query is not None and value is not None

    def split(rows: ir.Value, count: int) -> ir.Value:
        shaped = edit.node(node, "Reshape", [rows, edit.constant([0, 0, count, head_dim], np.int64)])[0]
        return edit.node(node, "Transpose", [shaped], perm=[0, 2, 1, 3])[0]

    def turn(x: ir.Value) -> ir.Value:
        cos, sin = node.inputs[7:9]
        assert cos is not None and sin is not None
        one, last = edit.constant([1], np.int64), edit.constant([3], np.int64)
        middle, end = edit.constant([head_dim // 2], np.int64), edit.constant([2**63 - 1], np.int64)
        first = edit.node(node, "Slice", [x, edit.constant([0], np.int64), middle, last, one])[0]
        second = edit.node(node, "Slice", [x, middle, end, last, one])[0]
        crossed = edit.node(node, "Concat", [edit.node(node, "Neg", [second])[0], first], axis=-1)[0]
        straight = edit.node(node, "Mul", [x, tables.rows(cos)])[0]
        return edit.node(node, "Add", [straight, edit.node(node, "Mul", [crossed, tables.rows(sin)])[0]])[0]

    query, key, value = split(query, heads), split(key, kv_heads), split(value, kv_heads)
    if attribute(node, "do_rotary", 0):
        table = node.inputs[7]
        assert table is not None
        if table.shape is None or table.shape[-1] != head_dim // 2:
            raise SemkvError(
                "GroupQueryAttention with rotary on a part of the head",
                where=node.name,
                expected=f"a table of {head_dim // 2} columns",
                got=table.shape,
            )
        query, key = turn(query), turn(key)
    window = attribute(node, "local_window_size", -1)
    made = edit.node(
        node,
        nexus.OP.name,
        [query, key, value, *node.inputs[3:5], bias, length],
        domain=ops.DOMAIN,
        outputs=3,
        scale=float(attribute(node, "scale", 0.0)),
        causal=1,
        softcap=float(attribute(node, "softcap", 0.0)),
        window=max(window, 0),
    )
    last_ = edit.node(node, "Transpose", [made[0]], perm=[0, 2, 1, 3])[0]
    joined = edit.node(node, "Reshape", [last_, edit.constant([0, 0, heads * head_dim], np.int64)])[0]
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for old, new in zip(node.outputs, (joined, *made[1:]), strict=False):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)

"""Rule for `com.microsoft::GroupQueryAttention`: packed or separate QKV, rotary inside or outside, soft cap, window.

A compressed cache has slots that are no positions, while the node turns keys by their place in its cache: rotary
inside it comes out, and turns by the graph's position_ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from semkv_deploy import ops
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.layers import Layer
from semkv_deploy.export.foreign.positions import Tables
from semkv_deploy.graph.editing import GraphEditor, attribute, sole
from semkv_deploy.ops import nexus_attention as nexus

_OFF = {
    "smooth_softmax": (0, -1),
    "k_quant_type": ("NONE", b"NONE"),
    "v_quant_type": ("NONE", b"NONE"),
    "kv_cache_bit_width": (0,),
    "qk_output": (0,),
    "causal": (1,),
    "sliding_window_cache": (0,),
}
"""Attributes whose other values NexusAttention does not have, and the values that are off."""

_KNOWN = {"num_heads", "kv_num_heads", "scale", "local_window_size", "softcap", "do_rotary", "rotary_interleaved"}


@dataclass(frozen=True)
class GroupQuery(Layer):
    """A `GroupQueryAttention` that appends to its own caches."""

    kind = "com.microsoft::GroupQueryAttention"

    @property
    def turned_by(self) -> tuple[ir.Value | None, ir.Value | None] | None:
        return (self.node.inputs[7], self.node.inputs[8]) if attribute(self.node, "do_rotary", 0) else None

    @property
    def new_key(self) -> ir.Value | None:
        return self.node.inputs[1]

    def replace(self, edit: GraphEditor, tables: Tables, head_dim: int, bias: ir.Value, length: ir.Value) -> ir.Node:
        return _replaced(self.node, edit, tables, head_dim, bias, length)


def is_group_query(node: ir.Node) -> bool:
    """Whether a node is one."""
    return node.domain == "com.microsoft" and node.op_type == "GroupQueryAttention"


def group_query(node: ir.Node) -> GroupQuery:
    """The layer of a node, its caches checked to be graph inputs and outputs that nothing else touches.

    Raises:
        SemkvError: naming the node.
    """
    past = tuple(node.inputs[3:5])
    if len(past) < 2 or any(value is None for value in past):
        raise SemkvError("attention without a past", where=node.name, expected="inputs past_key and past_value")
    present = tuple(node.outputs[1:3])
    key, value = past
    assert key is not None and value is not None
    for cache in (key, value):
        if not cache.is_graph_input():
            raise SemkvError(
                "a cache that is no graph input (a sliding or shared cache)", where=node.name, got=cache.name
            )
        # A size may be read of it, as exporters do; a value may not.
        readers = [use.node for use in cache.uses() if use.node is not node and use.node.op_type != "Shape"]
        if any(is_group_query(other) for other in readers):
            raise SemkvError("two attentions share a cache", where=cache.name, got=[node.name, readers[0].name])
        if readers:
            raise SemkvError("a cache is read by another node", where=node.name, got=readers[0].name)
    if len(present) < 2 or any(not output.is_graph_output() or output.uses() for output in present):
        raise SemkvError(
            "attention whose cache does not leave the graph as it was appended to",
            where=node.name,
            expected="outputs present_key and present_value that are graph outputs",
        )
    return GroupQuery(
        node=node,
        past=(key, value),
        present=(present[0], present[1]),
        query_heads=attribute(node, "num_heads", 0),
        kv_heads=attribute(node, "kv_num_heads", 0),
        window=max(attribute(node, "local_window_size", -1), 0),
    )


def check_node(node: ir.Node, mask: ir.Value | None) -> None:
    """Compares a node with what the rule takes.

    Raises:
        SemkvError: naming the node and the first difference.
    """

    def differs(what: str, expected: object, got: object) -> SemkvError:
        return SemkvError(f"GroupQueryAttention with {what}", where=node.name, expected=expected, got=got)

    if attribute(node, "sliding_window_cache", 0):
        raise SemkvError(
            "GroupQueryAttention on a cache of its window alone, which the node cuts itself",
            where=node.name,
            expected="sliding_window_cache 0",
            got=1,
            fix="write it again with the builder's --extra_options windowed_kv_cache=false",
        )
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


def _replaced(
    node: ir.Node, edit: GraphEditor, tables: Tables, head_dim: int, bias: ir.Value, length: ir.Value
) -> ir.Node:
    heads, kv_heads = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    query, key, value = node.inputs[:3]
    if key is None:
        sizes = edit.constant([count * head_dim for count in (heads, kv_heads, kv_heads)], np.int64)
        query, key, value = edit.node(node, "Split", [query, sizes], outputs=3, axis=-1)
    assert query is not None and value is not None

    def split(rows: ir.Value, count: int) -> ir.Value:
        shaped = edit.node(node, "Reshape", [rows, edit.constant([0, 0, count, head_dim], np.int64)])[0]
        return edit.node(node, "Transpose", [shaped], perm=[0, 2, 1, 3])[0]

    def turn(x: ir.Value, width: int) -> ir.Value:
        """Turns the first `width` values of each head, and leaves the others as they are."""
        cos, sin = node.inputs[7:9]
        assert cos is not None and sin is not None

        def part(start: int, end: int) -> ir.Value:
            ends = [edit.constant([bound], np.int64) for bound in (start, end, 3, 1)]
            return edit.node(node, "Slice", [x, *ends])[0]

        turned = x if width == head_dim else part(0, width)
        negated = edit.node(node, "Neg", [part(width // 2, width)])[0]
        crossed = edit.node(node, "Concat", [negated, part(0, width // 2)], axis=-1)[0]
        straight = edit.node(node, "Mul", [turned, tables.rows(cos)])[0]
        total = edit.node(node, "Add", [straight, edit.node(node, "Mul", [crossed, tables.rows(sin)])[0]])[0]
        return total if width == head_dim else edit.node(node, "Concat", [total, part(width, head_dim)], axis=-1)[0]

    query, key, value = split(query, heads), split(key, kv_heads), split(value, kv_heads)
    if attribute(node, "do_rotary", 0):
        table = node.inputs[7]
        columns = None if table is None or table.shape is None else table.shape[-1]
        if not isinstance(columns, int) or not 0 < 2 * columns <= head_dim:
            raise SemkvError(
                "GroupQueryAttention with rotary tables that fit no head",
                where=node.name,
                expected=f"1 to {head_dim // 2} columns",
                got=columns,
            )
        query, key = turn(query, 2 * columns), turn(key, 2 * columns)
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
    attention = made[0].producer()
    assert attention is not None
    return attention

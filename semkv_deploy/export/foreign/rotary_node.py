"""ONNX Runtime's `RotaryEmbedding` in standard operators, which every target has; ONNX's own is one of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.layers import CONTRIB
from semkv_deploy.graph.editing import GraphEditor, attribute, replace

_OFF = {"interleaved": 0, "is_packed_batching": 0, "scale": 1.0}
"""Attributes, and the values that are taken."""

_Rows = dict[tuple[ir.Value, ir.Value, int], ir.Value]
"""By table, positions and the axis of heads: rows of a table, made once for all layers."""


def expand_rotary(graph: ir.Graph) -> int:
    """Replaces every RotaryEmbedding in place; returns how many.

    Raises:
        SemkvError: for one that interleaves or scales, or whose tables or positions are of another shape.
    """
    nodes = [node for node in graph if node.op_type == "RotaryEmbedding" and node.domain == CONTRIB]
    edit = GraphEditor(graph, "rotary")
    made: _Rows = {}
    for node in nodes:
        _expand(node, edit, made)
    return len(nodes)


def _expand(node: ir.Node, edit: GraphEditor, made: _Rows) -> None:
    def differs(what: str, expected: object, got: object) -> SemkvError:
        return SemkvError(f"RotaryEmbedding with {what}", where=node.name, expected=expected, got=got)

    for name, value in _OFF.items():
        if attribute(node, name, value) != value:
            raise differs(name, value, attribute(node, name, value))
    source, positions, cos, sin = node.inputs
    ranks = [None if value is None or value.shape is None else len(value.shape) for value in node.inputs]
    if source is None or cos is None or sin is None or ranks[0] not in (3, 4):
        raise differs("an input of unknown shape", "3 or 4 dimensions", ranks[0])
    if positions is None or ranks[1:] != [2, 2, 2]:
        expected = "position_ids [batch, rows] and tables [positions, size / 2]"
        raise differs("other tables or positions", expected, f"{ranks[1:]} dimensions")
    assert cos.shape is not None
    columns, rank = cos.shape[-1], ranks[0]
    if not isinstance(columns, int):
        raise differs("tables of unknown size", "columns that are a number", cos.shape)
    heads, width = attribute(node, "num_heads", 0), attribute(node, "rotary_embedding_dim", 0)
    if width and width != 2 * columns:
        raise differs("a part that its tables do not turn", 2 * columns, width)
    split = source
    if rank == 3:
        sizes = [0, 0, heads, -1] if heads else [0, 0, -1, 2 * columns]
        split = edit.node(node, "Reshape", [source, edit.constant(sizes, np.int64)])[0]

    def part(start: int, end: int) -> ir.Value:
        ends = [edit.constant([bound], np.int64) for bound in (start, end, 3, 1)]
        return edit.node(node, "Slice", [split, *ends])[0]

    def rows(table: ir.Value) -> ir.Value:
        """`[B,1,S,R]` of heads that come first, `[B,S,1,R]` of heads that come last."""
        axis = 1 if rank == 4 else 2
        key = (table, positions, axis)
        if key not in made:
            half = edit.node(node, "Gather", [table, positions], axis=0)[0]
            whole = edit.node(node, "Concat", [half, half], axis=-1)[0]
            made[key] = edit.node(node, "Unsqueeze", [whole, edit.constant([axis], np.int64)])[0]
        return made[key]

    turned = part(0, 2 * columns) if width else split
    negated = edit.node(node, "Neg", [part(columns, 2 * columns)])[0]
    crossed = edit.node(node, "Concat", [negated, part(0, columns)], axis=-1)[0]
    straight = edit.node(node, "Mul", [turned, rows(cos)])[0]
    total = edit.node(node, "Add", [straight, edit.node(node, "Mul", [crossed, rows(sin)])[0]])[0]
    if width:
        total = edit.node(node, "Concat", [total, part(2 * columns, np.iinfo(np.int64).max)], axis=-1)[0]
    if rank == 3:
        total = edit.node(node, "Reshape", [total, edit.constant([0, 0, -1], np.int64)])[0]
    replace(node, [total])

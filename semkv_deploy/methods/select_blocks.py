"""Lets a portable decoder attend to chosen blocks in steps: the graph's rewriting.

The graph gets an input `block_end` `[B,N]` int64 (where each of a row's blocks ends, in slots, the open one last, then
0) and for every cache group `representatives` `[B,Hkv,N,R,E]` of the cache's type, which it reads. From `block_end` it
makes, once for all layers, the uniform form of the blocks: a table of slots `[B,N,L]`, their count, and which are
pinned. In a run of one token each attention takes a list of `width` slots that `SemanticBlockSelect` chooses by its
query; in a run of several, all slots. What decides is the shape of the run, never data.

Where a cache is evicted, heads keep other slots and so have other blocks: with `by_head`, `block_end` is `[B,H,N]` over
the heads of all groups in order. `SemanticBlockSelect` then takes each KV head as a batch row of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from semkv_deploy.graph.editing import GraphEditor, attribute, replace, static
from semkv_deploy.methods.attention_nodes import require_plain, required_attention_nodes
from semkv_deploy.methods.representatives import (
    BLOCK_END,
    REPRESENTATIVES,
    Kind,
    scoring_query,
    table_size,
)
from semkv_deploy.model import names
from semkv_deploy.ops import DOMAIN, VERSION, semantic_block_select
from semkv_deploy.ops import nexus_attention as nexus

if TYPE_CHECKING:
    from collections.abc import Sequence

INDEXED = "indexed"


def select_blocks(
    model: ir.Model, *, longest: int, width: int, kind: Kind, first: int, recent: int, by_head: bool = False
) -> None:
    """Rewrites a portable decoder in place.

    Args:
        longest: slots of a block at most.
        width: slots that a step attends to beside its own.
        kind: of representatives.
        first, recent: blocks that are always attended to, at the beginning and, the open one included, at the end.
        by_head: every KV head has blocks of its own.

    Raises:
        SemkvError: when it has no `NexusAttention`, or one with options.
    """
    graph = model.graph
    nodes = required_attention_nodes(graph)
    edit = GraphEditor(graph, "blocks")
    batch = nodes[0].inputs[3].shape[0]  # type: ignore[union-attr,index]
    heads = [static(node.inputs[3], 1) for node in nodes if node.inputs[3] is not None]
    shape = [batch, *([sum(heads)] if by_head else []), "blocks"]
    ends = ir.Value(name=BLOCK_END, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(ends)
    tables = _tables(edit, nodes[0], ends, graph.inputs[0], longest, first, recent)
    for number, node in enumerate(nodes):
        require_plain(node)
        cache = node.inputs[3]
        assert cache is not None and cache.shape is not None
        kv_heads, size = static(cache, 1), static(cache, 3)
        tables.heads = (sum(heads[:number]), sum(heads[: number + 1])) if by_head else None
        given = ir.Value(
            name=names.decoder_input(REPRESENTATIVES, number, len(nodes)),
            shape=ir.Shape([batch, kv_heads, "blocks", *table_size(kind, size)]),
            type=cache.type,
        )
        graph.inputs.append(given)
        index = _index(edit, node, given, tables, kv_heads, width, kind)
        attributes = {name: attribute(node, name, default) for name, default in nexus.OP.attributes.items()}
        result = edit.node(
            node,
            node.op_type,
            [*node.inputs, index],
            domain=DOMAIN,
            outputs=3,
            name=node.name,
            **attributes,
            **{INDEXED: 1},
        )
        indexed = result[0].producer()
        assert indexed is not None
        indexed.overload = INDEXED
        node.name = f"{node.name}.whole"
        result[0].shape, result[0].type = node.outputs[0].shape, node.outputs[0].type
        replace(node, result)
    for key in [key for key in model.functions if key[:2] == (DOMAIN, nexus.OP.name)]:
        del model.functions[key]
    for proto in (nexus.function_proto(INDEXED), semantic_block_select.function_proto()):
        function: ir.Function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION


class _Tables:
    """What all layers share.

    Attributes:
        slots, count, pinned: `[…,N,L]`, `[…]`, `[…,N]`, where … is B, or B and the KV heads of all groups.
        step: whether a run has one row.
        heads: where blocks are by head, the group's part of them.
    """

    def __init__(self, slots: ir.Value, count: ir.Value, pinned: ir.Value, step: ir.Value) -> None:
        self.slots, self.count, self.pinned, self.step = slots, count, pinned, step
        self.heads: tuple[int, int] | None = None


def _tables(
    edit: GraphEditor, before: ir.Node, ends: ir.Value, ids: ir.Value, longest: int, first: int, recent: int
) -> _Tables:
    def add(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return edit.node(before, op_type, list(inputs), **attributes)[0]

    def ints(*values: int) -> ir.Value:
        return edit.constant(values, np.int64)

    assert ends.shape is not None
    zero, one = edit.constant(0, np.int64), edit.constant(1, np.int64)
    axis = len(ends.shape) - 1
    number = add("Squeeze", add("Shape", ends, start=axis, end=axis + 1))
    behind = add("Sub", add("Shape", ends, start=axis, end=axis + 1), ints(1))
    moved = add("Slice", ends, ints(0), behind, ints(axis))
    starts = add("Pad", moved, ints(*[0] * axis, 1, *[0] * axis, 0))
    length = add("Max", add("Sub", ends, starts), zero)
    step = edit.constant(np.arange(longest), np.int64)
    slot = add("Add", add("Unsqueeze", starts, ints(-1)), step)
    inside = add("Less", step, add("Unsqueeze", length, ints(-1)))
    slots = add("Where", inside, slot, edit.constant(-1, np.int64))
    used = add("Cast", add("Greater", ends, zero), to=int(ir.DataType.INT64))
    count = add("ReduceSum", used, ints(axis), keepdims=0)
    block = add("Range", zero, number, one)
    newest = add("Sub", add("Unsqueeze", count, ints(axis)), edit.constant(recent, np.int64))
    pinned = add("Or", add("Less", block, edit.constant(first, np.int64)), add("GreaterOrEqual", block, newest))
    tokens = add("Squeeze", add("Shape", ids, start=1, end=2))
    numbers = add("Cast", pinned, to=int(ir.DataType.INT64))
    for value, shape in ((slots, [*ends.shape, longest]), (count, ends.shape[:-1]), (numbers, [*ends.shape])):
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.INT64)
    return _Tables(slots, count, numbers, add("Equal", tokens, one))


def _index(
    edit: GraphEditor, node: ir.Node, given: ir.Value, tables: _Tables, kv_heads: int, width: int, kind: Kind
) -> ir.Value:
    """`[B,Hkv,W]`: chosen slots in a step, else all live ones."""
    cache, length, query = node.inputs[3], node.inputs[6], node.inputs[0]
    assert cache is not None and cache.shape is not None and length is not None and query is not None
    then = ir.Graph([], [], nodes=[], name="chosen")
    inner = GraphEditor(then, f"{node.name}.chosen")
    asked = [scoring_query(inner, query, kind), given, tables.slots, tables.count, tables.pinned]
    if tables.heads is not None:
        asked = _by_head(inner, asked, tables.heads)
    op_type = semantic_block_select.OP.name
    (chosen,) = inner.node(None, op_type, asked, domain=DOMAIN, width=width, reduce_max=0)
    if tables.heads is not None:
        chosen.shape, chosen.type = _shape(asked[0], [1, width]), ir.TensorType(ir.DataType.INT64)
        (chosen,) = inner.node(None, "Reshape", [chosen, inner.constant([-1, kv_heads, width], np.int64)])
    other = ir.Graph([], [], nodes=[], name="every")
    every = _every(GraphEditor(other, f"{node.name}.every"), cache, length, kv_heads)
    for value, slots in ((chosen, width), (every, None)):
        value.shape = ir.Shape([cache.shape[0], kv_heads, slots])
        value.type = ir.TensorType(ir.DataType.INT64)
    then.outputs.append(chosen)
    other.outputs.append(every)
    return edit.node(
        node,
        "If",
        [tables.step],
        then_branch=ir.AttrGraph("then_branch", then),
        else_branch=ir.AttrGraph("else_branch", other),
    )[0]


def _every(edit: GraphEditor, cache: ir.Value, length: ir.Value, kv_heads: int) -> ir.Value:
    """`[B,Hkv,C]`: all live slots, then -1."""

    def add(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return edit.node(None, op_type, list(inputs), **attributes)[0]

    def ints(*values: int) -> ir.Value:
        return edit.constant(values, np.int64)

    capacity = add("Squeeze", add("Shape", cache, start=2, end=3))
    slot = add("Range", edit.constant(0, np.int64), capacity, edit.constant(1, np.int64))
    live = add("Less", slot, add("Unsqueeze", length, ints(1, 2)))
    return add("Expand", add("Where", live, slot, edit.constant(-1, np.int64)), ints(1, kv_heads, 1))


def _by_head(edit: GraphEditor, asked: Sequence[ir.Value], heads: tuple[int, int]) -> list[ir.Value]:
    """What `SemanticBlockSelect` takes, each KV head of a group a batch row: its heads lie behind one another.

    Args:
        asked: query `[B,Hq,S,E]`, representatives `[B,Hkv,N,R,E]`, and of all groups' heads slots, count, pinned.
        heads: the group's first, and the one behind its last.
    """
    query, given, slots, count, pinned = asked
    first, last = heads
    group = static(query, 1) // (last - first)

    def folded(value: ir.Value, *sizes: int) -> ir.Value:
        """With the heads in the first axis; a size 0 is the value's own there."""
        shape = edit.constant([-1, *sizes], np.int64)
        (result,) = edit.node(None, "Reshape", [value, shape])
        assert value.shape is not None
        own = [size or value.shape[number] for number, size in enumerate(sizes, 1)]
        result.shape, result.type = _shape(given, own, last - first), value.type
        return result

    def of_group(value: ir.Value) -> ir.Value:
        ends = [edit.constant([end], np.int64) for end in (first, last, 1)]
        (part,) = edit.node(None, "Slice", [value, *ends])
        (more,) = edit.node(None, "Shape", [value], start=2)
        (shape,) = edit.node(None, "Concat", [edit.constant([-1], np.int64), more], axis=0)
        (rows,) = edit.node(None, "Reshape", [part, shape])
        assert value.shape is not None
        rows.shape, rows.type = _shape(given, list(value.shape[2:]), last - first), value.type
        return rows

    return [
        folded(query, group, 0, static(query, 3)),
        folded(given, 1, 0, 0, 0),
        *map(of_group, (slots, count, pinned)),
    ]


def _shape(like: ir.Value, sizes: Sequence[Any], heads: int = 0) -> ir.Shape:
    """A shape whose first axis is batch x heads; with `heads` 0 that of `like`.

    Args:
        like: has the batch in its first axis.
    """
    assert like.shape is not None
    first = like.shape[0]
    if heads:
        first = first * heads if isinstance(first, int) else ir.SymbolicDim(f"{names.FOLDED_ROWS}{heads}")
    return ir.Shape([first, *sizes])

"""Lets a portable decoder attend to chosen blocks in steps: the graph's rewriting, and the program that maps blocks.

The graph gets an input `block_end` `[B,N]` int64 (where each of a row's blocks ends, in slots, the open one last, then
0) and for every cache group `representatives` `[B,Hkv,N,R,E]` of the cache's type, which it reads. From `block_end` it
makes, once for all layers, the uniform form of the blocks: a table of slots `[B,N,L]`, their count, and which are
pinned. In a run of one token each attention takes a list of `width` slots that `SemanticBlockSelect` chooses by its
query; in a run of several, all slots. What decides is the shape of the run, never data.
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
    map_text,
    scoring_query,
    table_size,
)
from semkv_deploy.model import names
from semkv_deploy.ops import DOMAIN, OPSET, VERSION, semantic_block_map, semantic_block_select
from semkv_deploy.ops import nexus_attention as nexus

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.model.config import ModelFacts

INDEXED = "indexed"


def select_blocks(model: ir.Model, *, longest: int, width: int, kind: Kind, first: int, recent: int) -> None:
    """Rewrites a portable decoder in place.

    Args:
        longest: slots of a block at most.
        width: slots that a step attends to beside its own.
        kind: of representatives.
        first, recent: blocks that are always attended to, at the beginning and, the open one included, at the end.

    Raises:
        SemkvError: when it has no `NexusAttention`, or one with options.
    """
    graph = model.graph
    nodes = required_attention_nodes(graph)
    edit = GraphEditor(graph, "blocks")
    batch = nodes[0].inputs[3].shape[0]  # type: ignore[union-attr,index]
    ends = ir.Value(name=BLOCK_END, shape=ir.Shape([batch, "blocks"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(ends)
    tables = _tables(edit, nodes[0], ends, graph.inputs[0], longest, first, recent)
    for number, node in enumerate(nodes):
        require_plain(node)
        cache = node.inputs[3]
        assert cache is not None and cache.shape is not None
        kv_heads, size = static(cache, 1), static(cache, 3)
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
    """What all layers share."""

    def __init__(self, slots: ir.Value, count: ir.Value, pinned: ir.Value, step: ir.Value) -> None:
        self.slots, self.count, self.pinned, self.step = slots, count, pinned, step
        self.every: dict[object, ir.Value] = {}


def _tables(
    edit: GraphEditor, before: ir.Node, ends: ir.Value, ids: ir.Value, longest: int, first: int, recent: int
) -> _Tables:
    def add(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return edit.node(before, op_type, list(inputs), **attributes)[0]

    def ints(*values: int) -> ir.Value:
        return edit.constant(values, np.int64)

    zero, one = edit.constant(0, np.int64), edit.constant(1, np.int64)
    number = add("Squeeze", add("Shape", ends, start=1, end=2))
    moved = add("Slice", ends, ints(0), add("Sub", add("Shape", ends, start=1, end=2), ints(1)), ints(1))
    starts = add("Pad", moved, ints(0, 1, 0, 0))
    length = add("Max", add("Sub", ends, starts), zero)
    step = edit.constant(np.arange(longest), np.int64)
    slot = add("Add", add("Unsqueeze", starts, ints(-1)), step)
    inside = add("Less", step, add("Unsqueeze", length, ints(-1)))
    slots = add("Where", inside, slot, edit.constant(-1, np.int64))
    used = add("Cast", add("Greater", ends, zero), to=int(ir.DataType.INT64))
    count = add("ReduceSum", used, ints(1), keepdims=0)
    block = add("Range", zero, number, one)
    newest = add("Sub", add("Unsqueeze", count, ints(1)), edit.constant(recent, np.int64))
    pinned = add("Or", add("Less", block, edit.constant(first, np.int64)), add("GreaterOrEqual", block, newest))
    tokens = add("Squeeze", add("Shape", ids, start=1, end=2))
    numbers = add("Cast", pinned, to=int(ir.DataType.INT64))
    assert ends.shape is not None
    for value, shape in ((slots, [*ends.shape, longest]), (count, [ends.shape[0]]), (numbers, [*ends.shape])):
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.INT64)
    return _Tables(slots, count, numbers, add("Equal", tokens, one))


def _index(
    edit: GraphEditor, node: ir.Node, given: ir.Value, tables: _Tables, kv_heads: int, width: int, kind: Kind
) -> ir.Value:
    """`[B,Hkv,W]`: chosen slots in a step, else all live ones."""
    cache, length, query = node.inputs[3], node.inputs[6], node.inputs[0]
    assert cache is not None and cache.shape is not None and length is not None and query is not None
    size = cache.shape[2]
    key = size.value if isinstance(size, ir.SymbolicDim) else size
    if (key, kv_heads) not in tables.every:
        capacity = edit.node(node, "Squeeze", [edit.node(node, "Shape", [cache], start=2, end=3)[0]])[0]
        zero, one = edit.constant(0, np.int64), edit.constant(1, np.int64)
        slot = edit.node(node, "Range", [zero, capacity, one])[0]
        column = edit.node(node, "Unsqueeze", [length, edit.constant([1, 2], np.int64)])[0]
        live = edit.node(node, "Less", [slot, column])[0]
        row = edit.node(node, "Where", [live, slot, edit.constant(-1, np.int64)])[0]
        heads = edit.constant([1, kv_heads, 1], np.int64)
        tables.every[key, kv_heads] = edit.node(node, "Expand", [row, heads])[0]
    every = tables.every[key, kv_heads]
    then = ir.Graph([], [], nodes=[], name="chosen")
    inner = GraphEditor(then, f"{node.name}.chosen")
    (chosen,) = inner.node(
        None,
        semantic_block_select.OP.name,
        [scoring_query(inner, query, kind), given, tables.slots, tables.count, tables.pinned],
        domain=DOMAIN,
        width=width,
        reduce_max=0,
    )
    other = ir.Graph([], [], nodes=[], name="every")
    (same,) = GraphEditor(other, f"{node.name}.every").node(None, "Identity", [every])
    for value, slots in ((chosen, width), (same, None)):
        value.shape = ir.Shape([cache.shape[0], kv_heads, slots])
        value.type = ir.TensorType(ir.DataType.INT64)
    then.outputs.append(chosen)
    other.outputs.append(same)
    return edit.node(
        node,
        "If",
        [tables.step],
        then_branch=ir.AttrGraph("then_branch", then),
        else_branch=ir.AttrGraph("else_branch", other),
    )[0]


def map_program(model: ModelFacts, *, longest: int, kind: Kind) -> onnx.ModelProto:
    """The program that writes the representatives of blocks that are closed, for a group of `model.kv_heads` heads.

    Inputs: `key_cache` `[B,H,C,D]` T, `representatives` `[B,H,N,R,E]` T, `block_start`, `block_length` and
    `block_number` `[B,M]` int64: length 0 with number N-1, which no block ever has, for none. Output:
    `representatives_out`.
    """
    import onnx
    import onnx.parser

    element = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}[model.dtype]
    heads, (vectors, size) = model.kv_heads, table_size(kind, model.head_dim)
    table = f"{element}[batch,{heads},blocks,{vectors},{size}]"
    graph = onnx.parser.parse_model(
        f"""
        <ir_version: 11, opset_import: ["": {OPSET}, "{DOMAIN}": {VERSION}]>
        map_blocks ({element}[batch,{heads},capacity,{model.head_dim}] key_cache, {table} representatives,
            int64[batch,closed] block_start, int64[batch,closed] block_length, int64[batch,closed] block_number)
            => ({table} representatives_out)
        {{
            {map_text(kind, longest)}
            axes = Constant <value = int64[3] {{1, 3, 4}}> ()
            number = Unsqueeze (block_number, axes)
            shape = Shape (updates)
            place = Expand (number, shape)
            representatives_out = ScatterElements <axis = 2> (representatives, place, updates)
        }}
        """
    )
    graph.functions.append(semantic_block_map.function_proto())
    onnx.checker.check_model(graph)
    return graph

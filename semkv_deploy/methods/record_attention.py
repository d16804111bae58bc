"""Lets a portable decoder write down how much its queries look at each slot, in the runs that ask for it.

The graph gets an input `record` `[2]` int64, and for every cache group a buffer more: `slot_attention` `[B,Hkv,C]`
float32, in and out. A run whose `record` is not 0 raises the value of each live slot to the largest softmax weight that
any of the run's rows, in any query head of the slot's KV head, gives it. The softmax is over the slots below `length`
alone: what the run appends takes no part. (KVzip's score, arXiv 2505.23416, when the rows are those of a text that the
cache already holds.) Where they are asked for, some of the run's queries, scaled, are written down beside it in a
second buffer, `reference_queries` `[B,Hkv,R,D]` float32: run `record[0]` of the `record[1]` of a reading fills its
share of it. A run with `record` 0 costs what it did: all of this is one `If` at the graph's end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import GraphEditor, attribute, static
from semkv_deploy.methods.attention_nodes import require_plain, required_attention_nodes
from semkv_deploy.methods.slot_attention import RECORD
from semkv_deploy.model.names import REFERENCE_QUERIES, SLOT_ATTENTION, decoder_input, decoder_output


class _Recorded(NamedTuple):
    """One `NexusAttention`, and a buffer of its group before and after a run."""

    node: ir.Node
    before: ir.Value
    after: ir.Value


def record_attention(model: ir.Model, queries: int = 0) -> None:
    """Adds `record`, and a `slot_attention` input and output for every cache group, in place.

    Args:
        model: a portable decoder. Windows are ignored: in such layers what is recorded means nothing.
        queries: reference queries of each KV head that are kept; 0: none.

    Raises:
        SemkvError: when it has no `NexusAttention`, or one with options, or records already; when queries are asked for
            and logits are capped, which a fit knows nothing of.
    """
    graph = model.graph
    nodes = required_attention_nodes(graph)
    if any(value.name == RECORD.name for value in graph.inputs):
        raise SemkvError("the decoder records attention already", where=graph.name)
    groups, kept = [], []
    for number, node in enumerate(nodes):
        require_plain(node)
        cache = node.inputs[3]
        assert cache is not None and cache.shape is not None
        heads = static(cache, 1)
        groups.append(_group(node, SLOT_ATTENTION, number, len(nodes), [cache.shape[0], heads, cache.shape[2]]))
        if queries:
            if attribute(node, "softcap", 0.0) > 0:
                raise SemkvError(
                    "no fit for attention whose logits are capped", where=node.name, fix="use the method with fit=none"
                )
            shape = [cache.shape[0], heads, queries, static(cache, 3)]
            kept.append(_group(node, REFERENCE_QUERIES, number, len(nodes), shape))
    record = ir.Value(name=RECORD.name, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    then = ir.Graph([], [], nodes=[], name="recorded")
    edit = GraphEditor(then, "record")
    rows = [_rows(group.node, edit) for group in groups]
    then.outputs.extend(_raised(group, of, edit) for group, of in zip(groups, rows, strict=True))
    then.outputs.extend(_sampled(group, of, record, edit) for group, of in zip(kept, rows, strict=False))
    groups += kept
    otherwise = ir.Graph([], [], nodes=[], name="not_recorded")
    edit = GraphEditor(otherwise, "record.not")
    otherwise.outputs.extend(_typed(edit.node(None, "Identity", [group.before])[0], group.after) for group in groups)
    outer = GraphEditor(graph, "record.whether")
    (flag,) = outer.node(None, "Gather", [record, outer.constant(0, np.int64)])
    (wanted,) = outer.node(None, "Cast", [flag], to=int(ir.DataType.BOOL))
    results = outer.node(
        None,
        "If",
        [wanted],
        outputs=len(groups),
        then_branch=ir.AttrGraph("then_branch", then),
        else_branch=ir.AttrGraph("else_branch", otherwise),
    )
    for group, result in zip(groups, results, strict=True):
        result.name, result.shape, result.type = group.after.name, group.after.shape, group.after.type
    graph.inputs.extend([record, *(group.before for group in groups)])
    graph.outputs.extend(results)


def _group(node: ir.Node, buffer: str, number: int, count: int, shape: Sequence[int | ir.SymbolicDim]) -> _Recorded:
    before, after = (
        ir.Value(name=name(buffer, number, count), shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name in (decoder_input, decoder_output)
    )
    return _Recorded(node, before, after)


def _typed(value: ir.Value, like: ir.Value) -> ir.Value:
    value.shape, value.type = like.shape, like.type
    return value


def _rows(node: ir.Node, edit: GraphEditor) -> ir.Value:
    """Scaled queries of the run, rows of all query heads of a KV head in one axis: `[B,Hkv,G*S,D]`."""
    query, cache = node.inputs[0], node.inputs[3]
    assert query is not None and cache is not None
    kv_heads, head_dim = static(cache, 1), static(cache, 3)
    (wide,) = edit.node(None, "Cast", [query], to=int(ir.DataType.FLOAT))
    (rows,) = edit.node(None, "Reshape", [wide, edit.constant([0, kv_heads, -1, head_dim], np.int64)])
    scale = attribute(node, "scale", 0.0) or 1 / math.sqrt(head_dim)
    return edit.node(None, "Mul", [rows, edit.constant(scale, np.float32)])[0]


def _sampled(group: _Recorded, rows: ir.Value, record: ir.Value, edit: GraphEditor) -> ir.Value:
    """The buffer with the run's share of a reading's queries, evenly spread over its rows."""
    places = static(group.before, 2)

    def add(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return edit.node(None, op_type, list(inputs), **attributes)[0]

    def ints(*values: int) -> ir.Value:
        return edit.constant(values, np.int64)

    number, runs = add("Gather", record, ints(0)), add("Gather", record, ints(1))
    stretched = add("Mul", ints(*range(places)), runs)
    run = add("Div", stretched, ints(places))
    inside = add("Sub", stretched, add("Mul", run, ints(places)))
    count = edit.node(None, "Shape", [rows], start=2, end=3)[0]
    index = add("Div", add("Mul", inside, count), ints(places))
    own = add("Unsqueeze", add("Equal", run, add("Sub", number, ints(1))), ints(1))
    return _typed(add("Where", own, add("Gather", rows, index, axis=2), group.before), group.after)


def _raised(group: _Recorded, rows: ir.Value, edit: GraphEditor) -> ir.Value:
    """The buffer with what the run's rows look at."""
    node = group.node
    length = node.inputs[6]
    # What was appended is in the output; the input may be the same memory, and written by then.
    keys = node.outputs[1]
    assert length is not None

    def add(op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return edit.node(None, op_type, list(inputs), **attributes)[0]

    def ints(*values: int) -> ir.Value:
        return edit.constant(values, np.int64)

    float32 = int(ir.DataType.FLOAT)
    logits = add("MatMul", rows, add("Transpose", add("Cast", keys, to=float32), perm=[0, 1, 3, 2]))
    softcap = attribute(node, "softcap", 0.0)
    if softcap > 0:
        cap = edit.constant(softcap, np.float32)
        logits = add("Mul", add("Tanh", add("Div", logits, cap)), cap)
    capacity = add("Squeeze", edit.node(None, "Shape", [keys], start=2, end=3)[0])
    slot = add("Range", edit.constant(0, np.int64), capacity, edit.constant(1, np.int64))
    live = add("Less", slot, add("Unsqueeze", length, ints(1, 2, 3)))
    # Finite, so that a run on an empty cache gives equal weights and no NaN.
    weights = add("Softmax", add("Where", live, logits, edit.constant(-1e30, np.float32)), axis=-1)
    largest = edit.node(None, "ReduceMax", [weights, ints(2)], keepdims=0)[0]
    return _typed(add("Max", group.before, largest), group.after)

"""A lowered decoder whose caches are full takes what onnxruntime-genai gives: ids, a mask, positions, caches.

Weights and everything between them stay as they are. What a session of ours counts for every group (length, biases,
the row whose logits are wanted) follows here from `attention_mask`: nothing is dropped, so that slots are positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import GraphEditor
from semkv_deploy.model.names import INPUT_IDS, LOGITS, LOGITS_INDEX, POSITION_IDS, cache_names, present_names

if TYPE_CHECKING:
    from collections.abc import Mapping

MASK = "attention_mask"
PAST, PRESENT = "past_key_values.%d.{}", "present.%d.{}"
"""Patterns of cache names, as onnxruntime-genai writes them."""

DECODE_GRAPH = "the bundle's decoder"
BUILD_FULL = "build it again with: --method full --budget 1 --native off"

_SEQLENS, _TOTAL, _BIAS, _QUERY_SEQLENS = 5, 6, 10, 16
"""Places among the inputs of `GroupQueryAttention`."""


def to_genai(model: ir.Model, groups: int, step_inputs: Mapping[str, int]) -> ir.Model:
    """Rewrites a decoder lowered to `GroupQueryAttention`, which is used up.

    Inputs afterwards: `input_ids`, `attention_mask` `[B,total]`, `position_ids` `[B,S]` (all int64), caches
    `[B,Hkv,slots,D]`; outputs: `logits` `[B,1,V]` of each row's last token, caches. Rows of a first run may be padded
    with mask 0 on the right, as genai's tokenizer pads them; later runs have a token in every place.

    Args:
        groups: cache groups, one a layer.
        step_inputs: further int64 inputs of the decoder and how many numbers they have; 0 where nothing is compressed.

    Raises:
        SemkvError: naming an input that onnxruntime-genai does not give.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if len(nodes) != groups:
        raise SemkvError(
            "the decoder's attention is not the kind that onnxruntime-genai's caches fit",
            where=DECODE_GRAPH,
            expected=f"{groups} GroupQueryAttention",
            got=f"{len(nodes)}, where others choose among slots",
            fix=BUILD_FULL,
        )
    edit = GraphEditor(graph, "genai")
    first = next(iter(graph))
    ids = next(value for value in graph.inputs if value.name == INPUT_IDS)
    mask = ir.Value(name=MASK, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "total"]))
    one = axis = edit.constant([1], np.int64)
    counted = edit.node(first, "ReduceSum", [mask, axis], keepdims=0)[0]
    # A row that is padded has fewer tokens than the run is wide, and then they are its first.
    rows = edit.node(first, "Min", [edit.node(first, "Shape", [ids], start=1, end=2)[0], counted])[0]
    last = edit.node(first, "Sub", [rows, one])[0]
    seqlens, query_seqlens, total = (
        edit.node(first, "Cast", [value], to=int(ir.DataType.INT32))[0]
        for value in (
            edit.node(first, "Sub", [counted, one])[0],
            rows,
            edit.node(first, "Squeeze", [edit.node(first, "Shape", [mask], start=1, end=2)[0]])[0],
        )
    )
    for node in nodes:
        for place, value in ((_SEQLENS, seqlens), (_TOTAL, total), (_BIAS, None), (_QUERY_SEQLENS, query_seqlens)):
            if place < len(node.inputs):
                node.replace_input_with(place, value)
    given = {
        LOGITS_INDEX: edit.node(first, "Unsqueeze", [last, axis])[0],
        **{name: edit.constant([0] * size, np.int64) for name, size in step_inputs.items()},
    }
    for value in list(graph.inputs):
        if value.name in given:
            ir.convenience.replace_all_uses_with(value, given[value.name])
    _keep(graph, groups, mask)
    common.RemoveUnusedNodesPass()(model)
    # Branches of a condition that is gone still count as users of what they read; a copy has none of them.
    model = ir.from_proto(ir.to_proto(model))
    graph = model.graph
    common.RemoveUnusedNodesPass()(model)
    for value in list(graph.inputs):
        if not value.uses() and value.name not in (INPUT_IDS, POSITION_IDS):
            graph.inputs.remove(value)
    _rename(graph, groups)
    return model


def _keep(graph: ir.Graph, groups: int, mask: ir.Value) -> None:
    """Leaves logits and caches among the outputs, and adds the mask behind the ids."""
    wanted = {LOGITS, *(name for group in range(groups) for name in present_names(group, groups))}
    outputs = [value for value in graph.outputs if value.name in wanted]
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    graph.inputs.insert(1, mask)


def _rename(graph: ir.Graph, groups: int) -> None:
    """Gives caches the names that genai's patterns have.

    Raises:
        SemkvError: when the graph has an input of another kind.
    """
    names = {INPUT_IDS: INPUT_IDS, MASK: MASK, POSITION_IDS: POSITION_IDS, LOGITS: LOGITS}
    for group in range(groups):
        key, value, _ = cache_names(group, groups)
        for old, pattern in zip(
            (key, value, *present_names(group, groups)), (PAST, PAST, PRESENT, PRESENT), strict=True
        ):
            names[old] = pattern.format(old.rpartition(".")[2]) % group
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.name not in names:
            raise SemkvError(
                "the decoder takes an input that onnxruntime-genai does not give",
                where=DECODE_GRAPH,
                got=tensor.name,
                fix=BUILD_FULL,
            )
        tensor.name = names[tensor.name]
        if tensor.shape is not None and tensor.name == LOGITS:
            tensor.shape = ir.Shape(["batch", 1, tensor.shape[2]])
        elif tensor.shape is not None and len(tensor.shape) == 4:
            slots = "past" if tensor.is_graph_input() else "total"
            tensor.shape = ir.Shape(["batch", tensor.shape[1], slots, tensor.shape[3]])

"""Puts a SONIC adapter into a portable decoder: rows of Nexus tokens, and LoRA weights that act on them alone.

A row is a Nexus row when its id is not below the vocabulary V. Its embedding is a row of a second table, which has the
sums of the adapter's two: row id - V, or, of a spread adapter, row r of the id V + r V + t, to which the embedding of
token t is added. A linear module's output becomes

    y = W x + B u,    u = A x on Nexus rows, 0 on all others

so that on all others 0 is added: `y` is `W x` bit for bit (but for the sign of a zero). `u` is selected and not
multiplied by a gate: what `A x` is where it is not wanted, an infinity included, shows nowhere.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import GraphEditor, static
from semkv_deploy.methods.sonic_adapter import NEXUS, TURN, SonicAdapter, check_base
from semkv_deploy.model.names import INPUT_IDS, LOGITS

PREFIX = "nexus"
"""Of the names of what is added: lowerings know it by them."""

ADDED, SELECTED = "lora/Add", "lora/Where"
"""Ends of the names of the nodes that add `B u`, and that select `u`."""

_MODULE = re.compile(r"layers\.(\d+)\.\w+\.(\w+_proj)/MatMul")


def add_adapter(model: ir.Model, adapter: SonicAdapter, where: object = "adapter") -> None:
    """Adds an adapter, in place.

    Raises:
        SemkvError: when the adapter is for another base model, or the decoder lacks a module that it has weights for.
    """
    graph = model.graph
    gather = _embedding(graph)
    table = gather.inputs[0]
    assert table is not None and table.const_value is not None
    check_base(adapter, table.const_value.numpy(), adapter.layers, where)
    edit = GraphEditor(graph, PREFIX)
    vocabulary = edit.constant(static(_output(graph), -1), np.int64)
    ids = next(value for value in graph.inputs if value.name == INPUT_IDS)
    (is_nexus,) = edit.node(gather, "GreaterOrEqual", [ids, vocabulary])
    (gate,) = edit.node(gather, "Unsqueeze", [is_nexus, edit.constant([-1], np.int64)], name=f"{PREFIX}.gate")
    _embed(edit, gather, adapter, ids, vocabulary, is_nexus, gate)
    nodes = {(int(found[1]), found[2]): node for node in graph if (found := _MODULE.fullmatch(node.name or ""))}
    for layer, module in adapter.modules:
        if (layer, module) not in nodes:
            raise SemkvError(
                f"the decoder has no module {module} in layer {layer}",
                where=where,
                expected="those that the adapter has weights for",
                fix="train the adapter on this model's own modules",
            )
        _adapt(edit, nodes[layer, module], *adapter.lora(layer, module), gate, where)


def _output(graph: ir.Graph) -> ir.Value:
    return next(value for value in graph.outputs if value.name == LOGITS)


def _embedding(graph: ir.Graph) -> ir.Node:
    """The node that reads the rows of input ids.

    Raises:
        SemkvError: when there is none, or several.
    """
    found = [
        node
        for node in graph
        if node.op_type == "Gather"
        and node.inputs[1] is not None
        and node.inputs[1].name == INPUT_IDS
        and node.inputs[0] is not None
        and node.inputs[0].is_initializer()
    ]
    if len(found) != 1:
        raise SemkvError(
            "no single embedding table", where=graph.name, expected="a Gather by input_ids", got=len(found)
        )
    return found[0]


def _embed(
    edit: GraphEditor,
    gather: ir.Node,
    adapter: SonicAdapter,
    ids: ir.Value,
    vocabulary: ir.Value,
    is_nexus: ir.Value,
    gate: ir.Value,
) -> None:
    """Nexus rows get their rows of the adapter's table."""
    sums = adapter.tensors[TURN][:, None] + adapter.tensors[NEXUS][None]
    zero = edit.constant(0, np.int64)
    rows = edit.constant(sums.reshape(-1, adapter.hidden), np.float32, f"{PREFIX}.embedding.weight")
    (beyond,) = edit.node(gather, "Sub", [ids, vocabulary])
    number, begins = beyond, zero
    if adapter.placement == "spread":
        (number,) = edit.node(gather, "Div", [beyond, vocabulary])
        (whole,) = edit.node(gather, "Mul", [number, vocabulary])
        (begins,) = edit.node(gather, "Sub", [beyond, whole])
    (row,) = edit.node(gather, "Where", [is_nexus, number, zero])
    (token,) = edit.node(gather, "Where", [is_nexus, begins, ids])
    (learned,) = edit.node(gather, "Gather", [rows, row], name=f"{PREFIX}.embedding/Gather", axis=0)
    readers = list(gather.outputs[0].uses())
    gather.replace_input_with(1, token)
    after = _following(gather)
    if adapter.placement == "spread":
        (learned,) = edit.node(after, "Add", [learned, gather.outputs[0]], name=f"{PREFIX}.embedding/Add")
    (chosen,) = edit.node(after, "Where", [gate, learned, gather.outputs[0]], name=f"{PREFIX}.embedding/Where")
    _replace(readers, chosen, gather.outputs[0])


def _adapt(edit: GraphEditor, product: ir.Node, a: Any, b: Any, gate: ir.Value, where: object) -> None:
    """Adds `B u` to a module's product."""
    source, weight, result = product.inputs[0], product.inputs[1], product.outputs[0]
    assert source is not None and weight is not None
    shape = (static(weight, 0), static(weight, 1))
    if (a.shape[1], b.shape[0]) != shape:
        raise SemkvError(
            "LoRA weights of another size",
            where=f"{where}, {product.name}",
            expected=list(shape),
            got=[a.shape[1], b.shape[0]],
            fix="take the adapter that was trained for this model",
        )
    name = f"{PREFIX}.{(product.name or '').removesuffix('/MatMul')}"
    readers, after = list(result.uses()), _following(product)
    down = edit.constant(np.ascontiguousarray(a.T), np.float32, f"{name}.lora_A.weight")
    up = edit.constant(np.ascontiguousarray(b.T), np.float32, f"{name}.lora_B.weight")
    (low,) = edit.node(after, "MatMul", [source, down], name=f"{name}.lora_A/MatMul")
    nothing = edit.constant(0, np.float32)
    (selected,) = edit.node(after, "Where", [gate, low, nothing], name=f"{name}.{SELECTED}")
    (added,) = edit.node(after, "MatMul", [selected, up], name=f"{name}.lora_B/MatMul")
    (total,) = edit.node(after, "Add", [result, added], name=f"{name}.{ADDED}")
    _replace(readers, total, result)


def _following(node: ir.Node) -> ir.Node:
    """The node behind one, in the graph's order."""
    assert node.graph is not None
    nodes = list(node.graph)
    return nodes[nodes.index(node) + 1]


def _replace(readers: list[Any], value: ir.Value, like: ir.Value) -> None:
    value.shape, value.type = like.shape, like.type
    for node, index in readers:
        node.replace_input_with(index, value)

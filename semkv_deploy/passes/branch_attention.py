"""Attention to chosen slots in ONNX Runtime's own operators: where there are no native ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from semkv_deploy.graph.editing import GraphEditor, attribute, replace, sole, static
from semkv_deploy.methods.attention_nodes import drop_slot_biases, required_attention_nodes
from semkv_deploy.ops import DOMAIN
from semkv_deploy.passes.inline_select import inline_node
from semkv_deploy.passes.selection import discard, gather_rows, mask_of_a_step, require_no_bias, slots_of_a_step

if TYPE_CHECKING:
    from semkv_deploy.methods.base import BiasMode

FLOOR = -1e30
"""What stands for -inf in a mask."""


def branch_attention(model: ir.Model, *, bias: BiasMode) -> int:
    """Lowers to standard operators for ONNX Runtime, in place: rows are appended, then one of two branches attends.

    Where a run has one row, over the rows of chosen slots; else over the whole cache. Caches are read after the append
    only, so that it may be in place.

    Returns:
        How many `NexusAttention` nodes there were.

    Raises:
        SemkvError: for slot biases that mean something.
    """
    graph = model.graph
    nodes = required_attention_nodes(graph)
    edit = GraphEditor(graph, "select")
    masks: dict[object, ir.Value] = {}
    for node in nodes:
        require_no_bias(node, bias)
        _branch(node, edit, masks)
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    model.opset_imports.pop(DOMAIN, None)
    drop_slot_biases(graph)
    return len(nodes)


def attends_in_branches(node: ir.Node) -> bool:
    """Whether an `If` is what `branch_attention` makes of an attention."""
    branches = [each.as_graph() for each in node.attributes.values()]
    return all(any(inner.op_type == "Attention" for inner in branch) for branch in branches)


def _branch(node: ir.Node, edit: GraphEditor, masks: dict[object, ir.Value]) -> None:
    query, key, value, key_cache, value_cache, _, length, index = node.inputs
    choice = sole(index, "If")
    assert query is not None and key_cache is not None and value_cache is not None and length is not None
    assert choice is not None and key is not None and value is not None and node.name is not None
    appended = []
    for part, cache, new in (("key", key_cache, key), ("value", value_cache, value)):
        name = f"{node.name}.{part}_append"
        (result,) = edit.node(node, "TensorScatter", [cache, new, length], name=name, axis=-2, mode="linear")
        result.shape, result.type = cache.shape, cache.type
        appended.append(result)
    window, softcap = attribute(node, "window", 0), attribute(node, "softcap", 0.0)
    if window not in masks:
        masks[window] = _mask_of_all(node, edit, query, key_cache, length, window)
    kernel: dict[str, Any] = {"scale": attribute(node, "scale", 0.0) or static(key_cache, 3) ** -0.5}
    if softcap > 0:
        kernel["softcap"] = softcap
    then = choice.attributes["then_branch"].as_graph()
    _attend_to_chosen(then, node, query, appended, length, window, kernel)
    other = ir.Graph([], [], nodes=[], name="whole")
    inner = GraphEditor(other, f"{node.name}.whole")
    other.outputs.extend(inner.node(None, "Attention", [query, *appended, masks[window]], **kernel))
    discard(choice.attributes["else_branch"].as_graph())
    choice.attributes.clear()
    branches: dict[str, Any] = {
        "then_branch": ir.AttrGraph("then_branch", then),
        "else_branch": ir.AttrGraph("else_branch", other),
    }
    name, node.name = node.name, f"{node.name}.portable"
    (attended,) = edit.node(node, "If", [choice.inputs[0]], name=name, **branches)
    for output in (attended, then.outputs[0], other.outputs[0]):
        output.shape, output.type = query.shape, query.type
    replace(node, [attended, *appended])
    assert isinstance(choice.graph, ir.Graph)
    choice.graph.remove(choice, safe=True)


def _attend_to_chosen(
    branch: ir.Graph,
    node: ir.Node,
    query: ir.Value,
    appended: list[ir.Value],
    length: ir.Value,
    window: int,
    kernel: dict[str, Any],
) -> None:
    """Makes of a branch that gives the chosen slots one that attends to them and to the new row."""
    edit = GraphEditor(branch, f"{node.name}.step")
    for selection in [each for each in branch if each.domain == DOMAIN]:
        inline_node(selection, edit, f"{node.name}.select")
    (chosen,) = branch.outputs
    branch.outputs.clear()
    heads, kv_heads, size = static(query, 1), static(appended[0], 1), static(query, 3)

    def folded(source: ir.Value, *sizes: int) -> ir.Value:
        return edit.node(None, "Reshape", [source, edit.constant(sizes, np.int64)])[0]

    slots = slots_of_a_step(edit, None, chosen, length, kv_heads)
    mask = mask_of_a_step(edit, None, slots, length, window, FLOOR)
    width = static(chosen, 2) + 1
    rows = [folded(gather_rows(edit, None, cache, slots), -1, 1, width, size) for cache in appended]
    # KV heads lie in the batch axis: each has a mask of its own.
    few = [folded(query, -1, heads // kv_heads, 1, size), *rows, folded(mask, -1, 1, 1, width)]
    (output,) = edit.node(None, "Attention", few, **kernel)
    branch.outputs.append(folded(output, -1, heads, 1, size))


def _mask_of_all(
    node: ir.Node, edit: GraphEditor, query: ir.Value, cache: ir.Value, length: ir.Value, window: int
) -> ir.Value:
    """`[B,1,S,C]` float32: the floor for slots behind a row's own, and for those that have left its window."""
    ends = [edit.node(node, "Squeeze", [edit.node(node, "Shape", [of], start=2, end=3)[0]])[0] for of in (query, cache)]
    zero, one = edit.constant(0, np.int64), edit.constant(1, np.int64)
    row, slot = (edit.node(node, "Range", [zero, end, one])[0] for end in ends)
    rows = edit.node(node, "Unsqueeze", [row, edit.constant([1], np.int64)])[0]
    start = edit.node(node, "Unsqueeze", [length, edit.constant([1, 2, 3], np.int64)])[0]
    position = edit.node(node, "Add", [start, rows])[0]
    hidden = edit.node(node, "Greater", [slot, position])[0]
    if window > 0:
        edge = edit.node(node, "Sub", [position, edit.constant(window, np.int64)])[0]
        too_old = edit.node(node, "LessOrEqual", [slot, edge])[0]
        hidden = edit.node(node, "Or", [hidden, too_old])[0]
    limits = (edit.constant(value, np.float32) for value in (FLOOR, 0.0))
    return edit.node(node, "Where", [hidden, *limits])[0]

"""Decoders whose steps attend to chosen slots: what a target makes of the branch that the portable graph has for it.

In the portable graph (`methods.select_blocks`) each indexed `NexusAttention` takes its list of slots from an `If` on
the number of new rows. A graph for steps alone chooses always (`choose_always`), one for prompts alone never
(`attend_to_all`), and one for both has all of the attention in the branches (`passes.branch_attention`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import GraphEditor, replace, sole
from semkv_deploy.methods.attention_nodes import attention_nodes, is_indexed

if TYPE_CHECKING:
    from semkv_deploy.methods.base import BiasMode


def selects(model: ir.Model) -> bool:
    """Whether the decoder's steps attend to chosen slots."""
    return any(is_indexed(node) for node in attention_nodes(model.graph))


def choose_always(model: ir.Model) -> None:
    """Moves what chooses slots out of its branch, in place: for runs of one row each."""
    for node in attention_nodes(model.graph):
        branch = sole(node.inputs[7], "If") if is_indexed(node) else None
        if branch is None:
            continue
        chosen = branch.attributes["then_branch"].as_graph()
        nodes, result = list(chosen), chosen.outputs[0]
        _move_constants(chosen, model.graph)
        chosen.outputs.clear()
        chosen.remove(nodes)
        model.graph.insert_before(branch, nodes)
        discard(branch.attributes["else_branch"].as_graph())
        replace(branch, [result])


def discard(branch: ir.Graph) -> None:
    """Empties a branch that goes away: what is left in it would count as a reader of values of the graph around it."""
    branch.outputs.clear()
    branch.remove(list(branch), safe=True)


def attend_to_all(model: ir.Model) -> None:
    """Makes every indexed `NexusAttention` a plain one, in place, and drops inputs that nothing reads then."""
    if not selects(model):
        return
    for node in attention_nodes(model.graph):
        if is_indexed(node):
            node.resize_inputs(7)
            node.overload = ""
            del node.attributes["indexed"]
    _drop_unused(model)


def _drop_unused(model: ir.Model) -> None:
    """Removes nodes and graph inputs from which nothing follows."""
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
    graph = model.graph
    for value in [value for value in graph.inputs if not value.uses()]:
        if (value.name or "").startswith(("block_end", "representatives.")):
            graph.inputs.remove(value)


def _move_constants(source: ir.Graph, target: ir.Graph) -> None:
    for name, value in list(source.initializers.items()):
        del source.initializers[name]
        target.register_initializer(value)


def gather_rows(edit: GraphEditor, before: ir.Node | None, cache: ir.Value, slots: ir.Value) -> ir.Value:
    """`[X,Y,W,D]`: rows of a cache `[X,Y,C,D]` at `slots` `[X,Y,W]`; the row of slot 0 for a negative one."""
    at = edit.node(before, "Max", [slots, edit.constant(0, np.int64)])[0]
    column = edit.node(before, "Unsqueeze", [at, edit.constant([-1], np.int64)])[0]
    (rows,) = edit.node(before, "GatherND", [cache, column], batch_dims=2)
    rows.type = cache.type
    return rows


def slots_of_a_step(
    edit: GraphEditor, before: ir.Node | None, index: ir.Value, length: ir.Value, heads: int
) -> ir.Value:
    """`[B,Hkv,W+1]`: the chosen slots, and that of the new row."""
    column = edit.node(before, "Unsqueeze", [length, edit.constant([1, 2], np.int64)])[0]
    new = edit.node(before, "Expand", [column, edit.constant([1, heads, 1], np.int64)])[0]
    return edit.node(before, "Concat", [index, new], axis=2)[0]


def mask_of_a_step(
    edit: GraphEditor, before: ir.Node | None, slots: ir.Value, length: ir.Value, window: int, floor: float
) -> ir.Value:
    """`[B,Hkv,1,W+1]` float32: 0 for slots that are attended to, the floor for negative ones and behind a window."""
    hidden = edit.node(before, "Less", [slots, edit.constant(0, np.int64)])[0]
    if window > 0:
        column = edit.node(before, "Unsqueeze", [length, edit.constant([1, 2], np.int64)])[0]
        edge = edit.node(before, "Sub", [column, edit.constant(window, np.int64)])[0]
        too_old = edit.node(before, "LessOrEqual", [slots, edge])[0]
        hidden = edit.node(before, "Or", [hidden, too_old])[0]
    ends = (edit.constant(value, np.float32) for value in (floor, 0.0))
    mask = edit.node(before, "Where", [hidden, *ends])[0]
    return edit.node(before, "Unsqueeze", [mask, edit.constant([2], np.int64)])[0]


def require_no_bias(node: ir.Node, bias: BiasMode) -> None:
    """Fails where slots that are chosen would have biases.

    Raises:
        SemkvError: naming the node.
    """
    if bias != "none":
        raise SemkvError(
            "chosen slots with biases have no lowering",
            where=node.name,
            expected="a method that merges nothing",
            got=f"biases by {bias}",
            fix="keep it as a plugin: --plugins nexus_attention",
        )

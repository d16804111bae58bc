"""Puts what acts on Nexus rows alone behind one condition for each layer's modules, so that other runs skip it.

For ONNX Runtime: a decode step has no Nexus row, and would read all LoRA weights to add nothing. Modules that read one
tensor (query, key and value; gate and up) share an `If`. Its other branch hands the base products on. The adapter's
embedding stays as it is: it is a row of a table. Weights in a branch are not quantised.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from semkv_deploy.graph.editing import GraphEditor, sole
from semkv_deploy.methods.sonic_decoder import ADDED, PREFIX


def branch_adapters(model: ir.Model) -> int:
    """Rewrites the model in place and returns how many conditions there are; a model without an adapter has none."""
    graph = model.graph
    adapted: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if (node.name or "").startswith(f"{PREFIX}.") and (node.name or "").endswith(ADDED):
            adapted.setdefault(_source(node), []).append(node)
    if not adapted:
        return 0
    gate = next(node for node in graph if node.name == f"{PREFIX}.gate")
    wanted = _any(graph, gate)
    for number, totals in enumerate(adapted.values()):
        _branch(graph, totals, wanted, number)
    common.TopologicalSortPass()(model)
    return len(adapted)


def _chain(total: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node]:
    """The nodes before an `Add` of `sonic_decoder`: A's product, the selection, B's product."""
    up = sole(total.inputs[1], "MatMul")
    select = sole(up.inputs[0], "Where") if up is not None else None
    down = sole(select.inputs[1], "MatMul") if select is not None else None
    assert up is not None and select is not None and down is not None
    return down, select, up


def _source(total: ir.Node) -> ir.Value:
    source = _chain(total)[0].inputs[0]
    assert source is not None
    return source


def _any(graph: ir.Graph, gate: ir.Node) -> ir.Value:
    """Whether any row of the run is a Nexus row, `[]`."""
    edit = GraphEditor(graph, f"{PREFIX}.any")
    (number,) = edit.node(None, "Cast", [gate.outputs[0]], to=int(ir.DataType.INT32))
    (largest,) = edit.node(None, "ReduceMax", [number], keepdims=0)
    (wanted,) = edit.node(None, "Cast", [largest], to=int(ir.DataType.BOOL))
    return wanted


def _branch(graph: ir.Graph, totals: list[ir.Node], wanted: ir.Value, number: int) -> None:
    """Moves the chains of some modules into an `If`."""
    bases = [total.inputs[0] for total in totals]
    results = [total.outputs[0] for total in totals]
    then = ir.Graph([], [], nodes=[], name=f"{PREFIX}.adapted_{number:03d}")
    otherwise = ir.Graph([], [], nodes=[], name=f"{PREFIX}.base_{number:03d}")
    edit = GraphEditor(otherwise, f"{PREFIX}.base_{number:03d}")
    readers = [list(result.uses()) for result in results]
    for total, result, base in zip(totals, results, bases, strict=True):
        nodes = [*_chain(total), total]
        graph.remove(nodes)
        for node in nodes:
            then.append(node)
        then.outputs.append(result)
        (same,) = edit.node(None, "Identity", [base])
        same.shape, same.type = result.shape, result.type
        otherwise.outputs.append(same)
    chosen = GraphEditor(graph, f"{PREFIX}.if_{number:03d}").node(
        None,
        "If",
        [wanted],
        outputs=len(totals),
        then_branch=ir.AttrGraph("then_branch", then),
        else_branch=ir.AttrGraph("else_branch", otherwise),
    )
    for result, value, uses in zip(results, chosen, readers, strict=True):
        value.shape, value.type = result.shape, result.type
        for node, index in uses:
            node.replace_input_with(index, value)

"""ONNX Runtime's own norms as standard operators: what our exports have, and what the passes fuse again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.layers import CONTRIB
from semkv_deploy.graph.editing import GraphEditor, attribute

_PLAIN, _SKIP = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"
_SKIP_LAYER = "SkipLayerNormalization"


def expand_norms(graph: ir.Graph) -> int:
    """Replaces every (Skip)SimplifiedLayerNormalization and SkipLayerNormalization in place; returns how many.

    Raises:
        SemkvError: for one over another axis than the last, or whose mean or inverse deviation is used.
    """
    edit = GraphEditor(graph, "norm")
    count = 0
    for node in list(graph):
        if node.op_type == _PLAIN and node.domain == "":
            _plain(node, edit)
        elif node.op_type == _SKIP and node.domain == CONTRIB:
            _skip(node, edit)
        elif node.op_type == _SKIP_LAYER and node.domain == CONTRIB:
            _skip_layer(node, edit)
        else:
            continue
        count += 1
    return count


def _plain(node: ir.Node, edit: GraphEditor) -> None:
    source, weight = node.inputs[:2]
    _check(node, used=node.outputs[1:])
    if attribute(node, "axis", -1) != -1:
        raise SemkvError("a norm over more than the last axis", where=node.name, got=attribute(node, "axis", -1))
    result = _norm(node, edit, source, weight)
    _replace(node, {0: result})


def _skip(node: ir.Node, edit: GraphEditor) -> None:
    source, skip, weight = node.inputs[:3]
    _check(node, used=node.outputs[1:3])
    total = edit.node(node, "Add", [source, skip])[0]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        total = edit.node(node, "Add", [total, node.inputs[3]])[0]
    _replace(node, {0: _norm(node, edit, total, weight), 3: total})


def _skip_layer(node: ir.Node, edit: GraphEditor) -> None:
    source, skip, weight, *more = node.inputs
    bias, added = (*more, None, None)[:2]
    scales = [weight] if bias is None else [weight, bias]
    _check(node, used=node.outputs[1:3])
    total = edit.node(node, "Add", [source, skip])[0]
    if added is not None:
        total = edit.node(node, "Add", [total, added])[0]
    epsilon = attribute(node, "epsilon", 1e-12)
    _replace(node, {0: edit.node(node, "LayerNormalization", [total, *scales], epsilon=epsilon)[0], 3: total})


def _norm(node: ir.Node, edit: GraphEditor, source: ir.Value | None, weight: ir.Value | None) -> ir.Value:
    """weight * source / sqrt(mean(source²) + epsilon), as our exports spell it."""
    epsilon = edit.constant(attribute(node, "epsilon", 1e-5), np.float32)
    square = edit.node(node, "Pow", [source, edit.constant(2.0, np.float32)])[0]
    mean = edit.node(node, "ReduceMean", [square, edit.constant([-1], np.int64)], keepdims=1)[0]
    root = edit.node(node, "Sqrt", [edit.node(node, "Add", [mean, epsilon])[0]])[0]
    scaled = edit.node(node, "Mul", [source, edit.node(node, "Reciprocal", [root])[0]])[0]
    return edit.node(node, "Mul", [weight, scaled])[0]


def _check(node: ir.Node, used: Sequence[ir.Value]) -> None:
    if any(value.uses() for value in used):
        raise SemkvError("a norm whose mean or deviation is used", where=node.name)


def _replace(node: ir.Node, values: dict[int, ir.Value]) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for index, value in values.items():
        if index < len(node.outputs):
            ir.convenience.replace_all_uses_with(node.outputs[index], value, replace_graph_outputs=True)
    graph.remove(node, safe=True)

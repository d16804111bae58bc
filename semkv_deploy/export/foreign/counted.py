"""Positions that a graph counts itself, by the length of its cache or its mask: found by what they are, not how.

A decoder without an input `position_ids` makes the positions of its tokens from sizes. Ours has caches of a constant
size, and rows of different lengths: it is told positions. So every value that is the positions is replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.evaluate import Evaluator
from semkv_deploy.export.foreign.masks import LENGTHS, feeds
from semkv_deploy.graph.inference import infer_types

if TYPE_CHECKING:
    from semkv_deploy.export.foreign.interface import Interface


class Counted(NamedTuple):
    """A value that is the positions.

    Attributes:
        value: `[1 or B, …, S, …]`, int64.
        ones: its axes of size 1 but the first.
    """

    value: ir.Value
    ones: tuple[int, ...]


def counted_positions(model: ir.Model, roles: Interface) -> tuple[Counted, ...]:
    """Values of a graph that are its tokens' positions, whatever its cache's length; types are inferred in the model.

    Those of one axis alone are left: in them rows of a batch cannot differ.
    """
    infer_types(model)
    found = [_counted(model, roles, value) for value in _of_sizes(model.graph, roles.mask)]
    return tuple(each for each in found if each is not None)


def _of_sizes(graph: ir.Graph, mask: ir.Value | None) -> list[ir.Value]:
    """Integers of several axes that depend on sizes and on the mask, and on no token."""
    known = {mask, *graph.initializers.values()}
    found = []
    for node in graph:
        if node.op_type != "Shape" and not all(value is None or value in known for value in node.inputs):
            continue
        known.update(node.outputs)
        for value in node.outputs:
            if value.dtype == ir.DataType.INT64 and value.shape is not None and len(value.shape) > 1:
                found.append(value)
    return found


def _counted(model: ir.Model, roles: Interface, value: ir.Value) -> Counted | None:
    ones: tuple[int, ...] = ()
    try:
        evaluator = Evaluator(model, str(value.name))
        for past, rows in LENGTHS:
            array = evaluator(feeds(roles, past, rows))
            if array.shape[0] != 1 or not np.array_equal(array.ravel(), np.arange(past, past + rows)):
                return None
            if rows > 1:
                ones = tuple(axis for axis, size in enumerate(array.shape) if axis and size == 1)
    except SemkvError:
        return None
    return Counted(value, ones)

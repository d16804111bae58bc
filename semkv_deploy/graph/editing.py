"""Small helpers for rewriting `onnx_ir` graphs in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from semkv_deploy.errors import SemkvError


class GraphEditor:
    """Adds nodes to a graph, and constants as initializers, with deterministic names."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        self._count = 0
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def constant(self, value: Any, dtype: npt.DTypeLike, name: str | None = None) -> ir.Value:
        """An initializer; equal constants are one initializer, of the first name that was given."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = name or f"{self.prefix}.constant_{len(self._constants)}"
            initializer = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                const_value=ir.tensor(array, name=name),
            )
            self.graph.register_initializer(initializer)
            self._constants[key] = initializer
        return self._constants[key]

    def node(
        self,
        before: ir.Node | None,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        outputs: int = 1,
        name: str | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """Inserts a node (before None: at the end) and returns its outputs."""
        self._count += 1
        node = ir.node(
            op_type,
            inputs=inputs,
            attributes=attributes or None,
            domain=domain,
            num_outputs=outputs,
            name=name or f"{self.prefix}.{op_type}_{self._count}",
        )
        for number, output in enumerate(node.outputs):
            output.name = f"{node.name}:{number}"
        if before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(before, node)
        return list(node.outputs)


def replace(node: ir.Node, values: Sequence[ir.Value]) -> None:
    """Gives the uses of a node's outputs to `values` (graph outputs keep their names) and removes the node."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for old, new in zip(node.outputs, values, strict=True):
        if old in graph.outputs:
            new.name, old.name = old.name, None
            new.shape, new.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def sole(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value`, when it is of this type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == domain else None


def static(value: ir.Value, axis: int) -> int:
    """A size that the graph states as a number.

    Raises:
        SemkvError: when the shape is unknown or the size is symbolic.
    """
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise SemkvError(
            "a static size is needed", where=f"{value.name}, axis {axis}", got=size, fix="export the model again"
        )
    return size


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or its default."""
    found = node.attributes.get(name)
    return default if found is None else found.value

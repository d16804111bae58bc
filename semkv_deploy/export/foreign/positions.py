"""Rotary tables at the graph's positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from semkv_deploy.graph.editing import GraphEditor


class Tables:
    """Rows of rotary tables `[P,D/2]` at the graph's positions, as `[B,1,S,D]`; made once for each table."""

    def __init__(self, edit: GraphEditor, first: ir.Node, positions: ir.Value) -> None:
        self._edit, self._first, self._positions = edit, first, positions
        self._rows: dict[ir.Value, ir.Value] = {}

    def rows(self, table: ir.Value) -> ir.Value:
        if table not in self._rows:
            edit, first = self._edit, self._first
            half = edit.node(first, "Gather", [table, self._positions], axis=0)[0]
            whole = edit.node(first, "Concat", [half, half], axis=-1)[0]
            self._rows[table] = edit.node(first, "Unsqueeze", [whole, edit.constant([1], np.int64)])[0]
        return self._rows[table]

"""What every rule finds: one layer's attention, its caches, and how it becomes ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from semkv_deploy.export.foreign.positions import Tables
    from semkv_deploy.graph.editing import GraphEditor

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

Pair = tuple[ir.Value, ir.Value]
"""Of keys, of values."""


@dataclass(frozen=True)
class Layer(ABC):
    """One layer's attention and its pair of caches: graph inputs that are read, graph outputs that replace them.

    Attributes:
        node: the node in whose place attention of ours is put; errors name it.
        query_heads: None where the graph does not say.
        window: sliding window in tokens, 0: none.
    """

    node: ir.Node
    past: Pair
    present: Pair
    query_heads: int | None
    kv_heads: int
    window: int

    kind = "attention"
    """What users call it."""

    @property
    def head_dim(self) -> int | None:
        """Values of a head, where the caches' shape states it."""
        shape = self.past[0].shape
        size = None if shape is None else shape[-1]
        if not isinstance(size, int):
            return None
        return size // self.kv_heads if len(shape or ()) == 3 else size

    @property
    def turned_by(self) -> tuple[ir.Value | None, ir.Value | None] | None:
        """Cosine and sine tables by which the node turns queries and keys itself; None: it does not."""
        return None

    @property
    @abstractmethod
    def new_key(self) -> ir.Value | None:
        """What is appended to the keys, of whatever layout; None: it is packed with other things."""

    @abstractmethod
    def replace(self, edit: GraphEditor, tables: Tables, head_dim: int, bias: ir.Value, length: ir.Value) -> ir.Node:
        """Puts a NexusAttention in the node's place, its new caches in those of the graph's outputs; returns it.

        Args:
            tables: rows of rotary tables at the graph's positions.
            bias: slot_bias of the layer, `[B,Hkv,C]`.
            length: of the layer, `[B]`.

        Raises:
            SemkvError: naming what has no place in a NexusAttention.
        """

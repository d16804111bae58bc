"""Rule for attention in standard operators: caches grown by Concat, MatMul, a mask, Softmax, MatMul.

What optimum and torch.onnx write. Between a cache and its product there may be whatever repeats and transposes heads;
scales may stand at either side of a product; the mask may be added or chosen, and its meaning is computed
(`evaluate`). Rotary is in the graph already, at the graph's positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from semkv_deploy import ops
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.layers import Layer
from semkv_deploy.export.foreign.positions import Tables
from semkv_deploy.graph.editing import GraphEditor, attribute, sole
from semkv_deploy.ops import nexus_attention as nexus

_LAYOUT = ("Unsqueeze", "Expand", "Reshape", "Transpose", "Tile", "Identity", "Cast")
"""What may stand between a cache and the product that reads it, beside scales."""


class Grown(NamedTuple):
    """A cache that grows: `present = Concat(past, new)` along its slots."""

    node: ir.Node
    past: ir.Value
    new: ir.Value
    present: ir.Value


class Mask(NamedTuple):
    """What hides slots: added to logits, or a condition under which they stand; None: what comes later, by the node."""

    value: ir.Value | None
    added: bool
    inverted: bool = False


@dataclass(frozen=True)
class Scores:
    """A product of queries and keys, followed back from its Softmax."""

    product: ir.Node
    scale: float
    softcap: float
    mask: Mask | None


@dataclass(frozen=True)
class Decomposed(Layer):
    """One layer's attention.

    Attributes:
        node: the product with the values; its output becomes NexusAttention's.
        query: `[B,Hq,S,D]`, before any scale.
        key, value: caches.
        masks: all that hide something, one at least.
    """

    query: ir.Value
    key: Grown
    value: Grown
    masks: tuple[Mask, ...]
    scale: float
    softcap: float

    kind = "attention of MatMul and Softmax"

    @property
    def new_key(self) -> ir.Value | None:
        return self.key.new

    def _is_flat(self, rows: ir.Value) -> bool:
        """Whether the node has a value's heads side by side, `[B,S,heads*D]`."""
        return False

    def replace(self, edit: GraphEditor, tables: Tables, head_dim: int, bias: ir.Value, length: ir.Value) -> ir.Node:
        assert self.query_heads is not None

        query = self._split(edit, self.query, self.query_heads, head_dim)
        key = self._split(edit, self.key.new, self.kv_heads, head_dim)
        value = self._split(edit, self.value.new, self.kv_heads, head_dim)
        made = edit.node(
            self.node,
            nexus.OP.name,
            [query, key, value, self.key.past, self.value.past, bias, length],
            domain=ops.DOMAIN,
            outputs=3,
            scale=self.scale,
            causal=1,
            softcap=self.softcap,
            window=self.window,
        )
        ir.convenience.replace_all_uses_with(self.node.outputs[0], self._joined(edit, made[0], head_dim))
        for grown in (self.key, self.value):
            grown.present.name = f"{grown.present.name}.grown"  # the name is the new one's; nothing reads it any more
        node = made[0].producer()
        assert node is not None
        return node

    def _split(self, edit: GraphEditor, rows: ir.Value, heads: int, head_dim: int) -> ir.Value:
        """`[B,heads,S,D]` of what the node reads. Exporters compute sizes of the input's; here they are numbers."""
        if not self._is_flat(rows):
            return edit.node(self.node, "Reshape", [rows, edit.constant([0, heads, -1, head_dim], np.int64)])[0]
        shaped = edit.node(self.node, "Reshape", [rows, edit.constant([0, 0, heads, head_dim], np.int64)])[0]
        return edit.node(self.node, "Transpose", [shaped], perm=[0, 2, 1, 3])[0]

    def _joined(self, edit: GraphEditor, result: ir.Value, head_dim: int) -> ir.Value:
        """What the node gives, of `[B,Hq,S,D]`."""
        if not self._is_flat(self.query):
            return result
        assert self.query_heads is not None
        last = edit.node(self.node, "Transpose", [result], perm=[0, 2, 1, 3])[0]
        sizes = edit.constant([0, 0, self.query_heads * head_dim], np.int64)
        return edit.node(self.node, "Reshape", [last, sizes])[0]


def grown_caches(graph: ir.Graph) -> list[Grown]:
    """Graph inputs that one Concat along the slots makes graph outputs of."""
    found = []
    for past in graph.inputs:
        readers = [use.node for use in past.uses() if use.node.op_type != "Shape"]
        if len(readers) != 1 or readers[0].op_type != "Concat" or past.shape is None or len(past.shape) != 4:
            continue
        (node,) = readers
        if len(node.inputs) == 2 and node.inputs[0] is past and attribute(node, "axis", 0) in (2, -2):
            new, present = node.inputs[1], node.outputs[0]
            if new is not None and present.is_graph_output():
                found.append(Grown(node, past, new, present))
    return found


def find_decomposed(graph: ir.Graph) -> Iterator[Decomposed]:
    """Layers of a graph, in order, with windows still to be found.

    Raises:
        SemkvError: naming the node at which a cache's attention is no longer what the rule takes.
    """
    caches = {grown.present: grown for grown in grown_caches(graph)}
    for node in graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        value = cache_behind(node.inputs[1], caches)
        softmax = _softmax_behind(node.inputs[0])
        if value is None or softmax is None:
            continue
        yield _layer(node, softmax, value[0], value[1], caches)


def _layer(node: ir.Node, softmax: ir.Node, value: Grown, factor: float, caches: dict[ir.Value, Grown]) -> Decomposed:
    if attribute(softmax, "axis", -1) not in (-1, 3):
        raise _differs(softmax, "Softmax over the last axis", f"axis {attribute(softmax, 'axis', -1)}")
    if factor != 1:
        raise _differs(node, "values as they are in the cache", f"values times {factor:g}")
    scores = _scores(softmax)
    key = cache_behind(scores.product.inputs[1], caches)
    if key is None:
        raise _differs(scores.product, "keys of a cache that grows by Concat", _made_by(scores.product.inputs[1]))
    if key[0].past is value.past:
        raise _differs(scores.product, "a cache of its own for keys and values", str(value.past.name))
    if scores.mask is None:
        raise _differs(softmax, "a mask between the product of queries and keys and Softmax", "none")
    query, scale = _without_scale(scores.product.inputs[0], scores.scale * key[1])
    past = value.past
    assert past.shape is not None
    kv_heads = past.shape[1]
    if not isinstance(kv_heads, int):
        raise _differs(node, "a cache whose heads are a number", str(past.shape))
    return Decomposed(
        node=node,
        past=(key[0].past, past),
        present=(key[0].present, value.present),
        query_heads=None,
        kv_heads=kv_heads,
        window=0,
        query=query,
        key=key[0],
        value=value,
        masks=(scores.mask,),
        # cap * tanh(scale * logits / cap), whatever stood where.
        scale=scale * scores.softcap if scores.softcap else scale,
        softcap=scores.softcap,
    )


def cache_behind(value: ir.Value | None, caches: dict[ir.Value, Grown]) -> tuple[Grown, float] | None:
    """The cache that a product's operand is made of, by layout and scales alone, and the scales' product."""
    factor = 1.0
    while value is not None and value not in caches:
        node = value.producer()
        if node is None:
            return None
        if node.op_type in ("Mul", "Div"):
            value, times = _scaled(node)
            factor *= times
        elif node.op_type in _LAYOUT:
            value = node.inputs[0]
        else:
            return None
    return None if value is None else (caches[value], factor)


def _softmax_behind(value: ir.Value | None) -> ir.Node | None:
    """The Softmax that a product's weights come from; a guard against rows without any slot may be between."""
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Softmax":
            return node
        if node.op_type == "Where" and sole(node.inputs[0], "IsNaN") is not None:
            value = node.inputs[2]
        elif node.op_type in ("Cast", "Identity", "Dropout"):
            value = node.inputs[0]
        else:
            return None
    return None


def _scores(softmax: ir.Node) -> Scores:
    """Follows logits back from their Softmax.

    Raises:
        SemkvError: naming the node that is none of scale, soft cap and mask.
    """
    value, factor, softcap = softmax.inputs[0], 1.0, 0.0
    mask: Mask | None = None
    while True:
        node = None if value is None else value.producer()
        if node is None:
            raise _differs(softmax, "logits that are a product of queries and keys", _made_by(value))
        if node.op_type == "MatMul":
            return Scores(node, factor, softcap, mask)
        if node.op_type in ("Cast", "Identity"):
            value = node.inputs[0]
        elif node.op_type in ("Mul", "Div"):
            value, times = _scaled(node)
            if value is None:
                raise _differs(node, "a scale that is a constant", _made_by(node.inputs[1]))
            factor *= times
        elif node.op_type == "Tanh" and not softcap:
            softcap, factor, value = factor, 1.0, node.inputs[0]
        elif node.op_type in ("Add", "Where") and mask is None and factor == 1 and not softcap:
            value, mask = _masked(node)
        else:
            raise _differs(node, "a scale, a soft cap or one mask before Softmax", node.op_type)


def _masked(node: ir.Node) -> tuple[ir.Value | None, Mask]:
    """Logits and mask of a node that puts them together."""
    if node.op_type == "Add":
        first, second = node.inputs
        assert first is not None and second is not None
        return (first, Mask(second, added=True)) if _is_product(first) else (second, Mask(first, added=True))
    condition, then, otherwise = node.inputs
    assert condition is not None
    if _is_product(then):
        return then, Mask(condition, added=False)
    return otherwise, Mask(condition, added=False, inverted=True)


def _is_product(value: ir.Value | None) -> bool:
    """Whether a value is a product, but for scales, caps and casts."""
    for _ in range(16):
        node = None if value is None else value.producer()
        if node is None:
            return False
        if node.op_type == "MatMul":
            return True
        if node.op_type not in ("Mul", "Div", "Cast", "Identity", "Tanh", "Add", "Where"):
            return False
        value = _scaled(node)[0] if node.op_type in ("Mul", "Div") else node.inputs[0]
    return False


def _without_scale(value: ir.Value | None, factor: float) -> tuple[ir.Value, float]:
    """A product's operand before scales, and their product with a factor."""
    while True:
        node = None if value is None else value.producer()
        if node is None or node.op_type not in ("Mul", "Div") or _scaled(node)[0] is None:
            assert value is not None
            return value, factor
        value, times = _scaled(node)
        factor *= times


def _scaled(node: ir.Node) -> tuple[ir.Value | None, float]:
    """What a Mul or Div scales by a constant, and the factor; None where nothing of it is a number."""
    for number, value in enumerate(node.inputs):
        factor = _number(value)
        if factor is None or (node.op_type == "Div" and number == 0):
            continue
        return node.inputs[1 - number], factor if node.op_type == "Mul" else 1 / factor
    return None, 1.0


def _number(value: ir.Value | None) -> float | None:
    """A constant of one element; exporters take square roots of them in the graph."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return float(tensor.numpy().reshape(-1)[0]) if tensor.size == 1 else None
    node = None if value is None else value.producer()
    if node is not None and node.op_type in ("Sqrt", "Cast", "Identity"):
        inner = _number(node.inputs[0])
        return None if inner is None else math.sqrt(inner) if node.op_type == "Sqrt" else inner
    return None


def _made_by(value: ir.Value | None) -> str:
    node = None if value is None else value.producer()
    return "an input" if node is None else f"{node.op_type} at {node.name}"


def _differs(node: ir.Node, expected: str, got: str) -> SemkvError:
    return SemkvError("attention that the importer does not know", where=node.name, expected=expected, got=got)

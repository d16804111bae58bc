"""Rule for ONNX's own `Attention` (opset 23): on caches grown by Concat, or on a past that it appends to itself.

`torch.onnx` writes it of scaled_dot_product_attention. Its mask is judged as that of attention in standard operators;
`is_causal` without one aligns the first row with the first slot, which is no decoder's mask once there is a past.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.decomposed import Decomposed, Grown, Mask, cache_behind, grown_caches
from semkv_deploy.graph.editing import attribute, sole

_PAST, _LENGTHS, _PRODUCTS = 4, 6, 3
"""Places of the past among the inputs, of lengths of a cache in place, and of products among the outputs."""


@dataclass(frozen=True)
class OfOperator(Decomposed):
    """An `Attention` node."""

    kind = "Attention of opset 23"


def find_operators(graph: ir.Graph) -> Iterator[OfOperator]:
    """Layers of a graph, in order, with windows still to be found.

    Raises:
        SemkvError: naming the node and what of it NexusAttention does not have.
    """
    caches = {grown.present: grown for grown in grown_caches(graph)}
    for node in graph:
        if node.op_type == "Attention" and node.domain == "" and not sole(node.inputs[1], "TensorScatter"):
            yield _layer(node, caches)


def _layer(node: ir.Node, caches: dict[ir.Value, Grown]) -> OfOperator:
    def differs(expected: str, got: object) -> SemkvError:
        return SemkvError("Attention that the importer does not know", where=node.name, expected=expected, got=got)

    def given(place: int) -> ir.Value | None:
        return node.inputs[place] if place < len(node.inputs) else None

    query, mask = node.inputs[0], given(3)
    if given(_LENGTHS) is not None:
        raise differs("caches that grow", "lengths of a cache that is appended to in place")
    if len(node.outputs) > _PRODUCTS and node.outputs[_PRODUCTS].uses():
        raise differs("no use of its products", node.outputs[_PRODUCTS].name)
    if attribute(node, "is_causal", 0) or mask is None:
        raise differs("a mask", "is_causal" if attribute(node, "is_causal", 0) else "none")
    if mask.dtype is None:
        raise differs("a mask whose type the graph states", mask.name)
    if query is None or query.shape is None or len(query.shape) != 4:
        raise differs("queries [batch, heads, rows, size]", None if query is None else query.shape)
    pair = []
    for number in (0, 1):
        past, new = given(_PAST + number), node.inputs[1 + number]
        if past is None:
            behind = cache_behind(new, caches)
            if behind is None or behind[1] != 1:
                raise differs("keys and values of a cache that grows by Concat", None if new is None else new.name)
            pair.append(behind[0])
        else:
            present = node.outputs[1 + number] if len(node.outputs) > 1 + number else None
            if not past.is_graph_input() or new is None or present is None or not present.is_graph_output():
                raise differs("a past that is an input, and a present that is an output", past.name)
            pair.append(Grown(node, past, new, present))
    key, value = pair
    if key.past is value.past:
        raise differs("a cache of its own for keys and values", key.past.name)
    heads = None if value.past.shape is None else value.past.shape[1]
    if not isinstance(heads, int):
        raise differs("a cache whose heads are a number", value.past.shape)
    stated = query.shape[1]
    return OfOperator(
        node=node,
        past=(key.past, value.past),
        present=(key.present, value.present),
        query_heads=stated if isinstance(stated, int) else None,
        kv_heads=heads,
        window=0,
        query=query,
        key=key,
        value=value,
        masks=(Mask(mask, added=mask.dtype != ir.DataType.BOOL),),
        scale=float(attribute(node, "scale", 0.0)),
        softcap=float(attribute(node, "softcap", 0.0)),
    )

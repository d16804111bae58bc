"""Rule for `com.microsoft::MultiHeadAttention`: on a past of its own, or on caches grown by Concat.

ONNX Runtime's optimizer writes it, and onnxruntime-genai's builder where it has no `GroupQueryAttention`. Queries, and
keys and values that it appends itself, are rows of all heads side by side; a bias of the projections may be added
within. `attention_bias`, `key_padding_mask` and `unidirectional` together are one mask, and judged as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.decomposed import Decomposed, Grown, Mask, cache_behind, grown_caches
from semkv_deploy.graph.editing import GraphEditor, attribute

if TYPE_CHECKING:
    from semkv_deploy.export.foreign.positions import Tables

_BIAS, _PADDING, _ADDED, _PAST, _SHARED, _PRODUCTS = 3, 4, 5, 6, 8, 3
"""Places among inputs: the projections' bias, masks, past, what shared buffers need; and of products among outputs."""


@dataclass(frozen=True)
class MultiHead(Decomposed):
    """A `MultiHeadAttention` node.

    Attributes:
        bias: of the projections of queries, keys and values, side by side.
    """

    bias: ir.Value | None

    kind = "com.microsoft::MultiHeadAttention"

    def replace(self, edit: GraphEditor, tables: Tables, head_dim: int, bias: ir.Value, length: ir.Value) -> ir.Node:
        if self.bias is None:
            return Decomposed.replace(self, edit, tables, head_dim, bias, length)
        assert self.query_heads is not None
        sizes = edit.constant(
            [heads * head_dim for heads in (self.query_heads, self.kv_heads, self.kv_heads)], np.int64
        )
        parts = edit.node(self.node, "Split", [self.bias, sizes], outputs=3, axis=0)
        query, key, value = (
            edit.node(self.node, "Add", [rows, part])[0]
            for rows, part in zip((self.query, self.key.new, self.value.new), parts, strict=True)
        )
        biased = replace(
            self, query=query, key=self.key._replace(new=key), value=self.value._replace(new=value), bias=None
        )
        return biased.replace(edit, tables, head_dim, bias, length)

    def _is_flat(self, rows: ir.Value) -> bool:
        return rows is self.query or self.key.node is self.node  # what Concat takes has heads already


def find_multi_heads(graph: ir.Graph) -> Iterator[MultiHead]:
    """Layers of a graph, in order, with windows still to be found.

    Raises:
        SemkvError: naming the node and what of it NexusAttention does not have.
    """
    caches = {grown.present: grown for grown in grown_caches(graph)}
    for node in graph:
        if node.op_type == "MultiHeadAttention" and node.domain == "com.microsoft":
            yield _layer(node, caches)


def _layer(node: ir.Node, caches: dict[ir.Value, Grown]) -> MultiHead:
    def differs(expected: str, got: object) -> SemkvError:
        what = "MultiHeadAttention that the importer does not know"
        return SemkvError(what, where=node.name, expected=expected, got=got)

    def given(place: int) -> ir.Value | None:
        return node.inputs[place] if place < len(node.inputs) else None

    query, key, value = given(0), given(1), given(2)
    for place in (_SHARED, _SHARED + 1):
        if (more := given(place)) is not None:
            raise differs("caches that grow, one beam", f"{more.name}, of buffers that are shared by steps or beams")
    if len(node.outputs) > _PRODUCTS and node.outputs[_PRODUCTS].uses():
        raise differs("no use of its products", node.outputs[_PRODUCTS].name)
    if query is None or key is None or value is None:
        packed = query if key is None else key
        raise SemkvError(
            f"MultiHeadAttention with {'QKV' if key is None else 'KV'} packed into one tensor",
            where=node.name,
            expected="queries, keys and values in tensors of their own",
            got=None if packed is None else f"{packed.name} {packed.shape or ''}",
            fix="ONNX Runtime's CPU does not run it, so that nothing could be proved: export for its CPU",
        )
    if query.shape is not None and len(query.shape) != 3:
        raise differs("queries [batch, rows, heads x size]", query.shape)
    heads = attribute(node, "num_heads", 0)
    pair = []
    for number, new in enumerate((key, value)):
        past = given(_PAST + number)
        if past is None:
            behind = cache_behind(new, caches)
            if behind is None or behind[1] != 1:
                raise differs("a past, or keys and values of a cache that grows by Concat", new.name)
            if given(_BIAS) is not None:
                raise differs("no bias where keys come out of a cache", "one")
            pair.append(behind[0])
            continue
        present = node.outputs[1 + number] if len(node.outputs) > 1 + number else None
        if not past.is_graph_input() or present is None or not present.is_graph_output():
            raise differs("a past that is an input, and a present that is an output", past.name)
        others = [use.node for use in past.uses() if use.node is not node and use.node.op_type != "Shape"]
        if others or present.uses():
            raise differs("a cache that nothing else reads", past.name)
        pair.append(Grown(node, past, new, present))
    if pair[0].past is pair[1].past:
        raise differs("a cache of its own for keys and values", pair[0].past.name)
    kv_heads = None if pair[1].past.shape is None else pair[1].past.shape[1]
    if not isinstance(kv_heads, int):
        raise differs("a cache whose heads are a number", pair[1].past.shape)
    filtered = attribute(node, "mask_filter_value", -10000.0)
    if filtered > -10000:
        raise differs("a mask_filter_value of -10000 or less", filtered)
    masks = [Mask(None, added=True)] if attribute(node, "unidirectional", 0) else []
    for place, added in ((_PADDING, False), (_ADDED, True)):
        mask = given(place)
        if mask is not None:
            masks.append(Mask(mask, added=added))
    if not masks:
        raise differs("a mask", "none")
    return MultiHead(
        node=node,
        past=(pair[0].past, pair[1].past),
        present=(pair[0].present, pair[1].present),
        query_heads=heads,
        kv_heads=kv_heads,
        window=0,
        query=query,
        key=pair[0],
        value=pair[1],
        masks=tuple(masks),
        scale=float(attribute(node, "scale", 0.0)),
        softcap=0.0,
        bias=given(_BIAS),
    )

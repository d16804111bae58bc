"""Rule for caches of constant size: `TensorScatter` writes rows in place, `Attention` (opset 24) reads all of them.

What mobius writes with a static cache. Its host counts: an input says where rows are written, another how many slots
are live then; both become our `length`. The causal mask is the node's own, aligned with the last live slot; one beside
it, or in its place, is judged as those of grown caches are. Caches have a dimension of heads, or all heads side by
side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.decomposed import Decomposed, Grown, Mask
from semkv_deploy.graph.editing import attribute, sole

_MASK, _PAST, _LIVE, _PRODUCTS = 3, 4, 6, 3
"""Places of the mask, the past and the live slots among the inputs, and of products among the outputs."""


@dataclass(frozen=True)
class InPlace(Decomposed):
    """An `Attention` on two `TensorScatter`.

    Attributes:
        written_at: `[B]`, the graph's input that says where rows are written.
        live: `[B]`, the graph's input that says how many slots are live after that.
        flat: heads are side by side, in caches `[B,C,Hkv*D]`.
    """

    written_at: ir.Value
    live: ir.Value
    flat: bool

    kind = "Attention of opset 24 on TensorScatter"

    def _is_flat(self, rows: ir.Value) -> bool:
        return self.flat

    @property
    def slots(self) -> object:
        """Slots of the caches as the graph states them: a number, or a symbol."""
        shape = self.past[0].shape
        return None if shape is None else shape[1 if self.flat else 2]

    @property
    def capacity(self) -> int | None:
        """Slots of the caches; None: the host chooses."""
        return self.slots if isinstance(self.slots, int) else None


def find_in_place(graph: ir.Graph) -> Iterator[InPlace]:
    """Layers of a graph, in order.

    Raises:
        SemkvError: naming the node and what of it NexusAttention does not have.
    """
    for node in graph:
        if node.op_type == "Attention" and node.domain == "" and sole(node.inputs[1], "TensorScatter"):
            yield _layer(node)


def _layer(node: ir.Node) -> InPlace:
    def differs(expected: str, got: object) -> SemkvError:
        what = "attention on a cache in place that the importer does not know"
        return SemkvError(what, where=node.name, expected=expected, got=got)

    def given(place: int) -> ir.Value | None:
        return node.inputs[place] if place < len(node.inputs) else None

    query = node.inputs[0]
    scatter = sole(node.inputs[1], "TensorScatter")
    cache = None if scatter is None else scatter.inputs[0]
    # Attention's inputs are all of three dimensions or all of four, and only the caches' are certain to be stated.
    rank = None if cache is None or cache.shape is None else len(cache.shape)
    if query is None or rank not in (3, 4):
        raise differs("caches of three or four dimensions", None if cache is None else cache.shape)
    flat = rank == 3
    masks = [Mask(None, added=True)] if attribute(node, "is_causal", 0) else []
    if (mask := given(_MASK)) is not None:
        if mask.dtype is None:
            raise differs("a mask whose type the graph states", mask.name)
        masks.append(Mask(mask, added=mask.dtype != ir.DataType.BOOL))
    if not masks:
        raise differs("is_causal 1, or a mask", "neither")
    if (past := given(_PAST)) is not None:
        raise differs("no past beside the cache", past.name)
    if len(node.outputs) > _PRODUCTS and node.outputs[_PRODUCTS].uses():
        raise differs("no use of its products", node.outputs[_PRODUCTS].name)
    live = given(_LIVE)
    if live is None or not live.is_graph_input():
        raise differs("nonpad_kv_seqlen, an input of the graph", None if live is None else live.name)
    key, value = (_scattered(node, place, 1 if flat else 2, differs) for place in (1, 2))
    if key.past is value.past:
        raise differs("a cache of its own for keys and values", key.past.name)
    places = {scatter.node.inputs[2] if len(scatter.node.inputs) > 2 else None for scatter in (key, value)}
    (written_at, *others) = places
    if others or written_at is None or not written_at.is_graph_input():
        raise differs("write_indices, one input of the graph", [None if each is None else each.name for each in places])
    shape = value.past.shape
    heads = attribute(node, "kv_num_heads", 0) if flat or shape is None else shape[1]
    if not isinstance(heads, int) or not heads:
        raise differs("a cache whose heads are a number", shape)
    stated = attribute(node, "q_num_heads", 0) if flat else None if query.shape is None else query.shape[1]
    return InPlace(
        node=node,
        past=(key.past, value.past),
        present=(key.present, value.present),
        query_heads=stated if isinstance(stated, int) else None,
        kv_heads=heads,
        window=0,
        query=query,
        key=key,
        value=value,
        masks=tuple(masks),
        scale=float(attribute(node, "scale", 0.0)),
        softcap=float(attribute(node, "softcap", 0.0)),
        written_at=written_at,
        live=live,
        flat=flat,
    )


def _scattered(node: ir.Node, place: int, axis: int, differs: Callable[[str, object], SemkvError]) -> Grown:
    """A cache as what `TensorScatter` makes of it; nothing else may read or write it.

    Raises:
        SemkvError: naming the attention that reads it.
    """
    scatter = sole(node.inputs[place], "TensorScatter")
    if scatter is None:
        raise differs("keys and values of a cache that TensorScatter writes", None)
    past, new = scatter.inputs[:2]
    present = scatter.outputs[0]
    mode = attribute(scatter, "mode", "linear")
    if mode not in ("linear", b"linear"):
        raise differs("a cache that is written from the front to the end", f"mode {mode}")
    rank = None if past is None or past.shape is None else len(past.shape)
    found = attribute(scatter, "axis", -2)
    if rank is None or found % rank != axis:
        raise differs(f"rows along axis {axis}", found)
    if past is None or new is None or not past.is_graph_input() or not present.is_graph_output():
        raise differs("a cache that is an input, and leaves the graph as it was written", scatter.name)
    readers = [use.node for use in (*past.uses(), *present.uses())]
    if any(reader not in (scatter, node) and reader.op_type != "Shape" for reader in readers):
        raise differs("a cache that nothing else reads", past.name)
    return Grown(scatter, past, new, present)

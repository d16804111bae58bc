"""What a stranger's decoder takes and gives: which inputs are caches, found by how they are used and never by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir
import onnx_ir.passes.common as common

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.cache_names import check_names
from semkv_deploy.export.foreign.counted import Counted, counted_positions
from semkv_deploy.export.foreign.decomposed import find_decomposed
from semkv_deploy.export.foreign.eight_bits import float_attention
from semkv_deploy.export.foreign.gqa import GroupQuery, check_node, group_query, is_group_query
from semkv_deploy.export.foreign.in_place import InPlace, find_in_place
from semkv_deploy.export.foreign.layers import Layer
from semkv_deploy.export.foreign.masks import with_windows
from semkv_deploy.export.foreign.multi_head import find_multi_heads
from semkv_deploy.export.foreign.operator import find_operators
from semkv_deploy.export.foreign.opsets import raise_opset
from semkv_deploy.export.foreign.refusals import check_operators, no_attention, other_input
from semkv_deploy.export.foreign.rotary_node import expand_rotary
from semkv_deploy.graph.inference import infer_types


@dataclass(frozen=True)
class Interface:
    """The roles of a decoder's inputs and outputs.

    Attributes:
        counts: what a host says of caches in place: where rows are written, how many slots are live.
        positions: None where the graph counts them itself.
        counted: what the graph counts as positions.
        pieces: whether it takes several tokens after others, and not prompts and single tokens alone.
    """

    ids: ir.Value
    counts: tuple[ir.Value, ...]
    mask: ir.Value | None
    positions: ir.Value | None
    logits: ir.Value
    layers: tuple[Layer, ...]
    counted: tuple[Counted, ...] = ()
    pieces: bool = True

    @property
    def mask_of_slots(self) -> bool:
        """Whether the mask is as wide as caches in place are, and not as what is live."""
        first = self.layers[0]
        if self.mask is None or self.mask.shape is None or not isinstance(first, InPlace):
            return False
        width, slots = self.mask.shape[-1], first.slots
        return isinstance(width, int) or width == slots


def find_interface(model: ir.Model, where: str) -> Interface:
    """Finds the roles of every input and output of a graph, and checks that its attention is what rules take.

    The model's nodes are sorted, its opset is raised where it is an old one; rotary nodes
    become standard operators, and attention's products floats.

    Raises:
        SemkvError: naming the input, output or node that has no role here.
    """
    check_operators(model.graph, where)
    raise_opset(model, where)
    graph = model.graph
    try:
        common.TopologicalSortPass()(model)
    except ValueError as error:
        raise SemkvError("nodes that feed each other in a circle", where=where, got=error) from None
    infer_types(model)
    expand_rotary(graph)
    float_attention(graph)
    layers: tuple[Layer, ...] = tuple(group_query(node) for node in graph if is_group_query(node))
    layers = layers or (
        *find_in_place(graph),
        *find_decomposed(graph),
        *find_operators(graph),
        *find_multi_heads(graph),
    )
    if not layers:
        raise no_attention(graph, where)
    caches = [value for layer in layers for value in layer.past]
    if len(set(caches)) < len(caches):
        shared = next(value for value in caches if caches.count(value) > 1)
        raise SemkvError("two attentions share a cache", where=shared.name, expected="a cache of its own for each")
    check_names(layers)
    found = {(layer.written_at, layer.live) if isinstance(layer, InPlace) else () for layer in layers}
    if len(found) > 1:
        raise SemkvError("layers differ in how their caches are kept", where=where, got=[each.kind for each in layers])
    (counts,) = found
    ids: ir.Value | None = None
    mask: ir.Value | None = None
    positions: ir.Value | None = None
    for value in graph.inputs:
        if value in caches or value in counts:
            continue
        if value.name == "input_ids":
            ids = value
        elif value.name == "attention_mask":
            mask = value
        elif value.name == "position_ids":
            positions = value
        else:
            raise other_input(value, graph)
    given = {output for layer in layers for output in layer.present}
    rest = [value for value in graph.outputs if value not in given]
    if ids is None or len(rest) != 1:
        raise SemkvError(
            "not a decoder of tokens",
            where=where,
            expected="an input input_ids, and one output, the logits, beside the caches",
            got=[value.name for value in rest],
        )
    for layer in layers:
        if isinstance(layer, GroupQuery):
            check_node(layer.node, mask)
    roles = Interface(ids, counts, mask, positions, rest[0], layers)
    if positions is None and not counts:
        roles = replace(roles, counted=counted_positions(model, roles))
    layers, pieces = with_windows(model, roles)
    return replace(roles, layers=layers, pieces=pieces)

"""What lowerings ask of `NexusAttention` nodes, and of the decoder inputs that only these read."""

from __future__ import annotations

import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import attribute
from semkv_deploy.model import names
from semkv_deploy.ops import DOMAIN


def attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The `NexusAttention` nodes of a decoder, in order."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == "NexusAttention"]


def required_attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    """`attention_nodes`, at least one.

    Raises:
        SemkvError: when the graph has none.
    """
    nodes = attention_nodes(graph)
    if not nodes:
        raise SemkvError(
            "the graph has no semkv::NexusAttention",
            where=graph.name,
            expected="a decoder written by `semkv-deploy export`",
            fix="export the checkpoint with semkv-deploy",
        )
    return nodes


def caps_logits(graph: ir.Graph) -> bool:
    """Whether some attention of a decoder caps its logits."""
    return any(attribute(node, "softcap", 0.0) > 0 for node in attention_nodes(graph))


def capacity_of(node: ir.Node) -> object:
    """The size of a node's slot axis: a number, a symbol, or None where the shape is unknown."""
    cache = node.inputs[3]
    size = cache.shape[2] if cache is not None and cache.shape is not None else None
    return size.value if isinstance(size, ir.SymbolicDim) else size


def is_indexed(node: ir.Node) -> bool:
    """Whether a `NexusAttention` has a list of slots, and no other option."""
    return node.overload == "indexed" and len(node.inputs) == 8 and len(node.outputs) == 3


def require_plain(node: ir.Node) -> None:
    """Fails for a `NexusAttention` with options (slot_index, quantised caches, attention mass).

    Raises:
        SemkvError: such nodes have no lowering to other operators.
    """
    if node.overload or len(node.inputs) != 7 or len(node.outputs) != 3:
        raise SemkvError(
            "NexusAttention with options has no lowering",
            where=node.name,
            expected="7 inputs and 3 outputs",
            got=node.overload or f"{len(node.inputs)} inputs and {len(node.outputs)} outputs",
            fix="keep it as a plugin: --plugins nexus_attention",
        )


def drop_slot_biases(graph: ir.Graph) -> None:
    """Removes the `slot_bias` inputs, which nothing reads any more."""
    for value in [value for value in graph.inputs if names.is_slot_bias(value.name)]:
        graph.inputs.remove(value)

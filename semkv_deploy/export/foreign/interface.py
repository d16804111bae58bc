"""What a stranger's decoder takes and gives: which inputs are caches, found by how they are used and never by name."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from semkv_deploy.errors import SemkvError

CONTRIB = "com.microsoft"
KNOWN_DOMAINS = ("", CONTRIB)

_STATE_OPERATORS = {"CausalConvWithState", "LinearAttention", "MambaScan", "SelectiveScan"}


@dataclass(frozen=True)
class Layer:
    """One layer's attention and its pair of caches: graph inputs that are read, graph outputs that replace them."""

    node: ir.Node
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]


@dataclass(frozen=True)
class Interface:
    """The roles of a decoder's inputs and outputs; positions are None where the graph counts them itself."""

    ids: ir.Value
    mask: ir.Value | None
    positions: ir.Value | None
    logits: ir.Value
    layers: tuple[Layer, ...]


def find_interface(graph: ir.Graph, where: str) -> Interface:
    """Finds the roles of every input and output of a graph whose layers are `GroupQueryAttention` nodes.

    Raises:
        SemkvError: naming the input, output or node that has no role here.
    """
    _check_domains(graph, where)
    layers = tuple(_layer(node) for node in graph if _is_gqa(node))
    if not layers:
        raise SemkvError(
            "no attention that an importer knows",
            where=where,
            expected="com.microsoft::GroupQueryAttention with past and present caches",
            got=_nearest(graph),
            fix="export the checkpoint it was made from: semkv-deploy export <checkpoint> -o <dir>",
        )
    caches = [value for layer in layers for value in layer.past]
    if len(set(caches)) < len(caches):
        shared = next(value for value in caches if caches.count(value) > 1)
        raise SemkvError("two attentions share a cache", where=shared.name, expected="a cache of its own for each")
    ids: ir.Value | None = None
    mask: ir.Value | None = None
    positions: ir.Value | None = None
    for value in graph.inputs:
        if value in caches:
            continue
        if value.name == "input_ids":
            ids = value
        elif value.name == "attention_mask":
            mask = value
        elif value.name == "position_ids":
            positions = value
        else:
            raise _other_input(value)
    given = {output for layer in layers for output in layer.present}
    rest = [value for value in graph.outputs if value not in given]
    if ids is None or len(rest) != 1:
        raise SemkvError(
            "not a decoder of tokens",
            where=where,
            expected="an input input_ids, and one output, the logits, beside the caches",
            got=[value.name for value in rest],
        )
    return Interface(ids, mask, positions, rest[0], layers)


def _is_gqa(node: ir.Node) -> bool:
    return node.domain == CONTRIB and node.op_type == "GroupQueryAttention"


def _check_domains(graph: ir.Graph, where: str) -> None:
    for node in graph:
        if node.domain not in KNOWN_DOMAINS:
            raise SemkvError(
                "an operator of a custom domain", where=f"{where}: {node.name}", got=f"{node.domain}::{node.op_type}"
            )
        if node.op_type in _STATE_OPERATORS:
            raise SemkvError(
                "a state-space or linear attention state is no KV cache",
                where=f"{where}: {node.name}",
                got=node.op_type,
            )


def _layer(node: ir.Node) -> Layer:
    """The caches of a node, checked to be graph inputs and outputs that nothing else touches.

    Raises:
        SemkvError: naming the node.
    """
    past = tuple(node.inputs[3:5])
    if len(past) < 2 or any(value is None for value in past):
        raise SemkvError("attention without a past", where=node.name, expected="inputs past_key and past_value")
    present = tuple(node.outputs[1:3])
    key, value = past
    assert key is not None and value is not None
    for cache in (key, value):
        if not cache.is_graph_input():
            raise SemkvError(
                "a cache that is no graph input (a sliding or shared cache)", where=node.name, got=cache.name
            )
        # A size may be read of it, as exporters do; a value may not.
        readers = [use.node for use in cache.uses() if use.node is not node and use.node.op_type != "Shape"]
        if any(_is_gqa(other) for other in readers):
            raise SemkvError("two attentions share a cache", where=cache.name, got=[node.name, readers[0].name])
        if readers:
            raise SemkvError("a cache is read by another node", where=node.name, got=readers[0].name)
    if len(present) < 2 or any(not output.is_graph_output() or output.uses() for output in present):
        raise SemkvError(
            "attention whose cache does not leave the graph as it was appended to",
            where=node.name,
            expected="outputs present_key and present_value that are graph outputs",
        )
    return Layer(node, (key, value), (present[0], present[1]))


def _nearest(graph: ir.Graph) -> str:
    """What of an attention there is, for the refusal."""
    kinds = {node.op_type for node in graph}
    for kind in ("Attention", "MultiHeadAttention", "TensorScatter", "Softmax"):
        if kind in kinds:
            node = next(node for node in graph if node.op_type == kind)
            return f"{kind} at {node.name}, which is not imported yet"
    return "no attention at all"


def _other_input(value: ir.Value) -> SemkvError:
    name = value.name or ""
    what = "an input that has no role in a decoder of tokens"
    if "encoder" in name or "cross" in name:
        what = "an encoder-decoder: cross attention's inputs are no cache of a decoder"
    elif "conv" in name or "ssm" in name or "recurrent" in name:
        what = "a state-space or linear attention state is no KV cache"
    return SemkvError(what, where=name, expected="input_ids, attention_mask, position_ids and caches of attention")

"""Which caches are appended in place, and whether that is safe.

With a cache's input and output in one buffer, a node that reads the old cache after the append sees the new one. So
every reader of a cache input, and of any value that may lie in its buffer (a Reshape of it, say), must be an ancestor
of the node that appends to it. That node itself reads the cache as the operand it updates, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.reads import captured, reads, subgraphs
from semkv_deploy.model import names
from semkv_deploy.ops import DOMAIN
from semkv_deploy.ops import nexus_attention as nexus

VIEWS = frozenset(
    {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators whose result may lie in the buffer of their first operand.

Runtimes copy for some of these and share for others, and which is theirs to choose.
"""

LENGTH_ONLY = ("Shape", "Size")
"""Operators that read no content."""


def appends(node: onnx.NodeProto) -> list[tuple[str, str]]:
    """Cache operand and result of a node that appends in place; [] for any other node.

    `TRT_KVCacheUpdate` is TensorRT's own, which goes by the name whatever the domain.
    """
    if node.op_type == "TRT_KVCacheUpdate" or (node.domain in ("", "ai.onnx") and node.op_type == "TensorScatter"):
        places = [(0, 0)]
    elif (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention"):
        places = [(3, 1), (4, 2)]
    elif node.domain == DOMAIN and node.op_type.split("_")[0] == nexus.OP.name:
        # Options are attributes, and part of the name of ONNX Runtime's native operators.
        spec = nexus.OP.with_options(*{*nexus.options_of(node), *node.op_type.split("_")[1:]})
        operands = [tensor.name for tensor in spec.inputs]
        results = [(index, tensor.name.removesuffix("_out")) for index, tensor in enumerate(spec.outputs)]
        places = [(operands.index(name), index) for index, name in results if name in operands]
    else:
        return []
    pairs = [(node.input[i], node.output[o]) for i, o in places if i < len(node.input) and o < len(node.output)]
    return [pair for pair in pairs if all(pair)]


def alias_map(graph: onnx.GraphProto) -> dict[str, str]:
    """Input -> output that may share its buffer: `past_key_values.NN.part` and `present.NN.part`, and what is raised.

    Raises:
        SemkvError: when a present has no past.
    """
    inputs = {value.name for value in graph.input}
    pairs = {}
    for output in graph.output:
        if names.is_cache_output(output.name):
            name = names.past_of(output.name)
            if name not in inputs:
                raise SemkvError("cache output without its input", where=output.name, expected=f"an input {name}")
            pairs[name] = output.name
        elif (raised := names.raised_by(output.name)) in inputs:
            pairs[str(raised)] = output.name
    return pairs


def prefixes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names of which the first is a prefix of the second."""
    found: list[tuple[str, str]] = []
    shorter: list[str] = []
    for name in sorted(set(names)):
        shorter = [first for first in shorter if name.startswith(first)]
        found += [(first, name) for first in shorter]
        shorter.append(name)
    return found


def colliding_names(graph: onnx.GraphProto, aliases: Mapping[str, str]) -> list[tuple[str, str]]:
    """State names of which one is a prefix of another: servers that match by prefix swap them.

    State is every cache, and whatever else goes in or out under a number: `slot_bias.10` and `slot_bias.100`.
    """
    caches = {*aliases, *aliases.values()}
    names = caches | {value.name for value in (*graph.input, *graph.output)}
    return [
        (first, second)
        for first, second in prefixes(names)
        if {first, second} <= caches or (first[-1:].isdigit() and second[len(first)].isdigit())
    ]


def check_alias_safety(graph: onnx.GraphProto, aliases: Mapping[str, str]) -> None:
    """Fails where appending in place would change what another node reads.

    Raises:
        SemkvError: naming the cache, the reader and the updater; or names of which one is a prefix of another, which
            servers that match by prefix swap.
    """
    for first, second in colliding_names(graph, aliases):
        raise SemkvError("one state name is a prefix of another", where=first, got=second, fix="pad numbers with zeros")
    check_read_order(graph, aliases)


def check_read_order(graph: onnx.GraphProto, aliases: Mapping[str, str]) -> None:
    """The part of `check_alias_safety` that is about nodes, not names."""
    producer = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    for source, result in aliases.items():
        updater = producer.get(result)
        if names.raised_by(result) == source:
            _check_raised(source, result, updater, readers)
            continue
        if updater is None or (source, result) not in appends(updater):
            raise SemkvError(
                "the cache is not appended to in place",
                where=result,
                expected=f"made by one node from {source}, as the operand that the node updates",
                got="nothing" if updater is None else f"{updater.op_type} {updater.name}",
            )
        _check_readers(graph, source, updater, readers, _ancestors(updater, producer), outputs)


def _check_raised(
    source: str, result: str, updater: onnx.NodeProto | None, readers: dict[str, list[onnx.NodeProto]]
) -> None:
    """A buffer that is raised, element by element, is read by what raises it and by nothing else."""
    others = [node for node in readers.get(source, []) if node is not updater]
    if updater is None or others:
        raise SemkvError(
            "the buffer is not raised in place",
            where=result,
            expected=f"made by one node, the only one that reads {source}",
            got=f"{others[0].op_type} {others[0].name} reads it too" if others else "nothing",
        )


def _check_readers(
    graph: onnx.GraphProto,
    source: str,
    updater: onnx.NodeProto,
    readers: dict[str, list[onnx.NodeProto]],
    ancestors: set[int],
    outputs: set[str],
) -> None:
    element = next((value.type.tensor_type.elem_type for value in graph.input if value.name == source), 0)
    shared = [source]
    for name in shared:
        through = "" if name == source else f" through {name}"
        if through and name in outputs:
            raise SemkvError(
                f"the output {name} may lie in the cache's buffer and show it after {updater.name} has appended to it",
                where=source,
                fix="make the output with an operator that computes, or read the cache's output",
            )
        for reader in readers.get(name, []):
            if reader.op_type in LENGTH_ONLY:
                continue
            if reader is updater:
                if through or list(updater.input).count(name) > 1 or name in captured(updater):
                    raise SemkvError(
                        f"{updater.op_type} {updater.name} reads the cache{through} while it appends to it",
                        where=source,
                        expected="the cache as one operand of its updater, the one that is updated",
                    )
            elif id(reader) not in ancestors:
                raise SemkvError(
                    f"{reader.op_type} {reader.name or next(iter(reader.output), '')} may read the cache{through} "
                    f"after {updater.name} has appended to it",
                    where=source,
                    expected="every reader of a cache to be an ancestor of its updater",
                    fix="read the cache's output instead, or make the updater depend on the reader",
                )
            shared += [view for view in _views(reader, {name}, element) if view not in shared]


def _views(node: onnx.NodeProto, names: set[str], element: int) -> list[str]:
    """Results of a node that may lie in the buffer of `names`, which hold `element`s."""
    if node.op_type in VIEWS:
        if not node.input or node.input[0] not in names:
            return []
        to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), 0)
        return [] if node.op_type == "Cast" and element and to and to != element else list(node.output)
    for body in subgraphs(node):
        inside = set(names)
        if names & set(node.input):  # Loop and Scan hand it on under a name of the body's.
            inside |= {value.name for value in body.input}
        for inner in body.node:
            inside.update(_views(inner, inside, element))
        if inside & {value.name for value in body.output}:
            return list(node.output)
    return []


def _ancestors(node: onnx.NodeProto, producer: dict[str, onnx.NodeProto]) -> set[int]:
    found: set[int] = set()
    pending = [node]
    while pending:
        for name in reads(pending.pop()):
            parent = producer.get(name)
            if parent is not None and id(parent) not in found:
                found.add(id(parent))
                pending.append(parent)
    return found

"""Which caches are appended in place, and whether that is safe.

With a cache's input and output in one buffer, a node that reads the old cache after the append sees the new one. So
every reader of a cache input must be an ancestor of the node that appends to it, or that node itself.
"""

from __future__ import annotations

import itertools

import onnx

from semkv_deploy.errors import SemkvError

UPDATERS = {("com.microsoft", "GroupQueryAttention"), ("semkv", "NexusAttention"), ("", "TensorScatter")}


def alias_map(graph: onnx.GraphProto) -> dict[str, str]:
    """Cache input -> output that may share its buffer: `past_key_values.NN.part` and `present.NN.part`.

    Raises:
        SemkvError: when a present has no past.
    """
    inputs = {value.name for value in graph.input}
    pairs = {}
    for output in graph.output:
        if output.name.startswith("present."):
            name = output.name.replace("present.", "past_key_values.", 1)
            if name not in inputs:
                raise SemkvError("cache output without its input", where=output.name, expected=f"an input {name}")
            pairs[name] = output.name
    return pairs


def check_alias_safety(graph: onnx.GraphProto, aliases: dict[str, str]) -> None:
    """Fails where appending in place would change what another node reads.

    Raises:
        SemkvError: naming the cache, the reader and the updater; or names of which one is a prefix of another, which
            servers that match by prefix swap.
    """
    names = sorted([*aliases, *aliases.values()])
    for first, second in itertools.pairwise(names):
        if second.startswith(first):
            raise SemkvError(
                "one cache name is a prefix of another", where=first, got=second, fix="pad numbers with zeros"
            )
    producer = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for source, result in aliases.items():
        updater = producer.get(result)
        if updater is None or (updater.domain, updater.op_type) not in UPDATERS or source not in updater.input:
            raise SemkvError(
                "the cache is not appended to in place",
                where=result,
                expected=f"made by one node from {source}",
                got="nothing" if updater is None else f"{updater.op_type} {updater.name}",
            )
        ancestors = _ancestors(updater, producer)
        for reader in readers.get(source, []):
            if reader is not updater and id(reader) not in ancestors and reader.op_type != "Shape":
                raise SemkvError(
                    f"{reader.op_type} {reader.name} may read the cache after {updater.name} has appended to it",
                    where=source,
                    expected="every reader of a cache to be an ancestor of its updater",
                    fix="read the cache's output instead, or make the updater depend on the reader",
                )


def _ancestors(node: onnx.NodeProto, producer: dict[str, onnx.NodeProto]) -> set[int]:
    found: set[int] = set()
    pending = [node]
    while pending:
        for name in pending.pop().input:
            parent = producer.get(name)
            if parent is not None and id(parent) not in found:
                found.add(id(parent))
                pending.append(parent)
    return found

"""What a node reads: its operands, and what the bodies inside it take from around them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Bodies and branches of a node."""
    for entry in node.attribute:
        if entry.HasField("g"):
            yield entry.g
        yield from entry.graphs


def captured(node: onnx.NodeProto) -> set[str]:
    """Names from around a node that its bodies read or hand out, at any depth."""
    names: set[str] = set()
    for body in subgraphs(node):
        made = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        made |= {output for inner in body.node for output in inner.output}
        read = {value.name for value in body.output}
        read |= {name for inner in body.node for name in reads(inner)}
        names |= read - made
    return names - {""}


def reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node needs before it can run: its operands and what its bodies capture."""
    return (set(node.input) | captured(node)) - {""}

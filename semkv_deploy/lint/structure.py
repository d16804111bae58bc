"""Whether an ONNX file holds a graph at all: what every rule, pass and shape inference takes for granted.

`onnx.checker` is not asked: it opens external data, refuses TensorRT's own operators in the standard domain, and calls
an unsorted graph invalid, which every runtime here takes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import onnx
import onnx.defs

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.reads import reads, subgraphs
from semkv_deploy.lint.onnxruntime import node_name

ELEMENTS = frozenset(onnx.TensorProto.DataType.values())
LEAST = {"TRT_Attention": (3, 1), "TRT_KVCacheUpdate": (3, 1)}
"""Inputs and outputs that an operator without a schema needs."""

FunctionKey = tuple[str, str, str]
T = TypeVar("T", bound=Hashable)


def check_structure(model: onnx.ModelProto) -> None:
    """Fails where a model contradicts the ONNX format.

    Raises:
        SemkvError: naming the node or value: an element type that does not exist, an operator without a required input,
            output, attribute or body, a value that nothing or that two nodes make, a cycle, functions that call each
            other in a circle.
    """
    opsets = _opsets(model.opset_import)
    _check_functions(model)
    try:
        _check_graph(model.graph, frozenset(), opsets)
        for function in model.functions:
            own = _opsets(function.opset_import) or opsets
            where = f"function {function.domain}.{function.name}"
            _check_nodes(function.node, list(function.input), function.output, frozenset(), own, where)
    except UnicodeDecodeError as error:
        raise SemkvError("a name in the model is not text", got=error.reason) from error


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    opsets = {entry.domain or "ai.onnx": entry.version for entry in imports}
    for domain, version in opsets.items():
        if not 0 < version < 2**31:
            raise SemkvError("an opset version that cannot be", where=domain, expected="1 or more", got=version)
    return opsets


def _check_graph(graph: onnx.GraphProto, outer: frozenset[str], opsets: Mapping[str, int]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type"):
            _check_element(value.type.tensor_type.elem_type, value.name)
    for tensor in graph.initializer:
        _check_element(tensor.data_type, tensor.name)
    given = [value.name for value in graph.input]
    weights = {tensor.name for tensor in graph.initializer}
    weights |= {sparse.values.name for sparse in graph.sparse_initializer}
    outputs = [value.name for value in graph.output]
    _check_nodes(graph.node, [*given, *(weights - set(given))], outputs, outer, opsets, f"graph {graph.name}")


def _check_nodes(
    nodes: Iterable[onnx.NodeProto],
    given: list[str],
    outputs: Iterable[str],
    outer: frozenset[str],
    opsets: Mapping[str, int],
    where: str,
) -> None:
    made = set(given)
    nodes = list(nodes)
    for node in nodes:
        _check_node(node, opsets)
        for name in node.output:
            if name and name in made:
                raise SemkvError("two nodes, or a node and an input, make one value", where=where, got=name)
            made.add(name)
    visible = made | outer
    for node in nodes:
        missing = sorted(reads(node) - visible)
        if missing:
            raise SemkvError("a node reads what nothing makes", where=node_name(node), got=missing[0])
        for body in subgraphs(node):
            _check_graph(body, frozenset(visible), opsets)
    absent = sorted(set(outputs) - visible)
    if absent:
        raise SemkvError("an output is made by no node", where=where, got=absent[0])
    _check_acyclic(nodes)


def _check_node(node: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
    texts = (node.name, node.op_type, node.domain, *node.input, *node.output)
    if not all(isinstance(text, str) for text in texts):
        raise SemkvError("a node's names are not UTF-8 text", where="graph", fix="export the model again")
    if not any(node.output):
        raise SemkvError("a node makes nothing", where=node_name(node), expected="at least one output")
    for attribute in node.attribute:
        for tensor in [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]:
            _check_element(tensor.data_type, f"{attribute.name} of {node_name(node)}")
    inputs, outputs = LEAST.get(node.op_type, (0, 1))
    schema = _schema(node, opsets)
    if schema is not None:
        inputs, outputs = schema.min_input, schema.min_output
        given = {attribute.name: attribute for attribute in node.attribute}
        for name, wanted in schema.attributes.items():
            graph = wanted.type == onnx.defs.OpSchema.AttrType.GRAPH
            found = given.get(name)
            if wanted.required and (found is None or (graph and not found.HasField("g"))):
                raise SemkvError(f"{node.op_type} lacks its attribute {name}", where=node_name(node))
    for kind, names, least in (("inputs", node.input, inputs), ("outputs", node.output, outputs)):
        if len(names) < least:
            raise SemkvError(
                f"{node.op_type} has too few {kind}",
                where=node_name(node),
                expected=f"at least {least}",
                got=len(names),
            )


def _schema(node: onnx.NodeProto, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
    domain = node.domain or "ai.onnx"
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(domain, 0), "" if domain == "ai.onnx" else domain)
    except onnx.defs.SchemaError:
        return None


def _check_element(element: int, where: str) -> None:
    if element not in ELEMENTS:
        raise SemkvError("an element type that ONNX does not have", where=where, got=element)


def _check_acyclic(nodes: list[onnx.NodeProto]) -> None:
    producer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needs = [{producer[name] for name in reads(node) if name in producer} for node in nodes]
    cycle = _cycle({index: sorted(others) for index, others in enumerate(needs)})
    if cycle:
        path = " -> ".join(node_name(nodes[index]) for index in reversed(cycle))
        raise SemkvError("the graph has a cycle", where=path, expected="values made before they are read")


def _check_functions(model: onnx.ModelProto) -> None:
    bodies = {_key(function): function.node for function in model.functions}
    calls = {key: sorted({call for call in _calls(nodes) if call in bodies}) for key, nodes in bodies.items()}
    cycle = _cycle(calls)
    if cycle:
        path = " -> ".join(f"{domain}.{name}" for domain, name, _ in cycle)
        raise SemkvError("functions call each other in a circle", where=path, fix="write the loop with Loop or Scan")


def _key(function: onnx.FunctionProto) -> FunctionKey:
    return function.domain, function.name, function.overload


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[FunctionKey]:
    for node in nodes:
        yield node.domain, node.op_type, node.overload
        for body in subgraphs(node):
            yield from _calls(body.node)


def _cycle(edges: Mapping[T, list[T]]) -> list[T]:
    """The nodes of one cycle, the first again at the end; [] where there is none."""
    done: set[T] = set()
    for start in edges:
        path: list[T] = []
        on_path: set[T] = set()
        pending: list[tuple[T, bool]] = [(start, False)]
        while pending:
            at, leaving = pending.pop()
            if leaving:
                path.pop()
                on_path.discard(at)
                done.add(at)
            elif at in on_path:
                return [*path[path.index(at) :], at]
            elif at not in done:
                path.append(at)
                on_path.add(at)
                pending.append((at, True))
                pending += [(other, False) for other in edges[at]]
    return []

"""A model as the rules look at it: functions inlined as the importer inlines them, types and shapes known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx.checker
import onnx.inliner
import onnx.shape_inference
from google.protobuf.message import DecodeError

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.reads import subgraphs
from semkv_deploy.lint.onnxruntime import Finding, Verdict, node_name

INLINE_BYTES = 4096
"""Larger weights are left out of shape inference: no shape depends on them."""

STANDARD_DOMAINS = ("", "ai.onnx")


class Placed(NamedTuple):
    """A node and the control-flow operators around it, outermost first."""

    node: onnx.NodeProto
    inside: tuple[str, ...]


class ValueType(NamedTuple):
    """Element type (`onnx.TensorProto.DataType`) and dimensions: a number, a symbol, or None; None: rank unknown."""

    element: int
    shape: tuple[int | str | None, ...] | None


class View:
    """What the rules ask of a model.

    Attributes:
        model: as given.
        graph: with local functions inlined, but for those of `plugins`.
        folder: where external data is looked for; None: it is not.
        plugins: operators asked for as plugins.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path | None, plugins: Collection[str]) -> None:
        self.model, self.folder, self.plugins = model, folder, frozenset(plugins)
        inlined = _inlined(_without_weights(model), self.plugins)
        self.graph = inlined.graph
        self._inferred = _inferred(inlined)
        self.inputs = {value.name for value in model.graph.input} - {value.name for value in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}

    @cached_property
    def nodes(self) -> list[Placed]:
        """All nodes, those of subgraphs included."""
        return list(_walk(self.graph, ()))

    def of_type(self, *names: str, domains: Collection[str] | None = STANDARD_DOMAINS) -> Iterator[Placed]:
        """Nodes of these operators; of any domain where `domains` is None, as the importer takes TensorRT's own."""
        return (
            placed
            for placed in self.nodes
            if placed.node.op_type in names and (domains is None or placed.node.domain in domains)
        )

    @cached_property
    def appends(self) -> list[Placed]:
        """Nodes that become the layer that appends to a cache, standard ones and TensorRT's own."""
        return [*self.of_type("TensorScatter"), *self.of_type("TRT_KVCacheUpdate", domains=None)]

    @cached_property
    def attentions(self) -> list[Placed]:
        """Nodes that become the attention layer, standard ones and TensorRT's own."""
        return [*self.of_type("Attention"), *self.of_type("TRT_Attention", domains=None)]

    @cached_property
    def producer(self) -> dict[str, onnx.NodeProto]:
        """Node that makes a value."""
        return {output: placed.node for placed in self.nodes for output in placed.node.output if output}

    @cached_property
    def types(self) -> dict[str, ValueType]:
        """What is known of each value's type."""
        found: dict[str, ValueType] = {}
        _collect_types(self._inferred.graph, found)
        return found

    def shape(self, node: onnx.NodeProto, index: int) -> tuple[int | str | None, ...] | None:
        """Dimensions of a node's input; None: no such input, or rank unknown."""
        known = self.types.get(argument(node, index) or "")
        return known.shape if known is not None else None

    def element(self, node: onnx.NodeProto, index: int) -> int | None:
        """Element type of a node's input, where known."""
        known = self.types.get(argument(node, index) or "")
        return known.element if known is not None else None


Rule = Callable[[View], Iterator[Finding]]


def argument(node: onnx.NodeProto, index: int) -> str | None:
    """Name of an input; None: not given."""
    return (node.input[index] or None) if index < len(node.input) else None


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    """An attribute; None: not given."""
    return next((entry for entry in node.attribute if entry.name == name), None)


def number(node: onnx.NodeProto, name: str, default: float = 0) -> float:
    """A numeric attribute."""
    found = attribute(node, name)
    if found is None:
        return default
    return found.f if found.type == onnx.AttributeProto.FLOAT else found.i


def text(node: onnx.NodeProto, name: str, default: str = "") -> str:
    """A text attribute."""
    found = attribute(node, name)
    return default if found is None else found.s.decode("utf-8", "replace")


def at(node: onnx.NodeProto, what: str, fix: str, verdict: Verdict) -> Finding:
    """A finding about a node."""
    return Finding(node_name(node), what, fix, verdict)


def _walk(graph: onnx.GraphProto, inside: tuple[str, ...]) -> Iterator[Placed]:
    for node in graph.node:
        yield Placed(node, inside)
        for body in subgraphs(node):
            yield from _walk(body, (*inside, node.op_type))


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which large and external initializers are inputs: types stay, bytes go."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph, source = light.graph, model.graph
    graph.name = source.name or "g"
    graph.node.extend(source.node)
    graph.output.extend(source.output)
    graph.value_info.extend(source.value_info)
    graph.input.extend(source.input)
    given = {value.name for value in source.input}
    for tensor in source.initializer:
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if not external and tensor.ByteSize() <= INLINE_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in given:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            graph.input.append(value)
    return light


def _inlined(model: onnx.ModelProto, plugins: Collection[str]) -> onnx.ModelProto:
    kept = [(function.domain, function.name) for function in model.functions if function.name in plugins]
    try:
        return onnx.inliner.inline_selected_functions(model, kept, exclude=True)
    except (RuntimeError, ValueError, DecodeError, onnx.checker.ValidationError) as error:
        raise SemkvError("the model's functions cannot be inlined", got=str(error).strip()) from error


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, onnx.checker.ValidationError):
        # A graph that contradicts itself: rules go by what it declares.
        return model


def _collect_types(graph: onnx.GraphProto, found: dict[str, ValueType]) -> None:
    for tensor in graph.initializer:
        found[tensor.name] = ValueType(tensor.data_type, tuple(tensor.dims))
    for value in [*graph.value_info, *graph.input, *graph.output]:
        kind = value.type.tensor_type
        shape = None
        if kind.HasField("shape"):
            shape = tuple(
                dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in kind.shape.dim
            )
        found[value.name] = ValueType(kind.elem_type, shape)
    for node in graph.node:
        for body in subgraphs(node):
            _collect_types(body, found)

"""A compressor of float32 caches for caches of another type, for the native operators of ONNX Runtime.

Operators that have a form for such caches (`ops.native`) get them as they lie. For all other nodes rows are widened,
and what they make of them is narrowed again. A slot that is kept comes out as it went in: widening loses nothing, and
narrowing gives back what was narrow (int8: the same codes, a scale within rounding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import DOMAIN, native
from semkv_deploy.passes.keep_native import CACHE_ELEMENT, PARTS

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from semkv_deploy.choices import CacheType

CODE_LIMIT = 127.0

OF_ANY_TYPE = ("Shape", "Size")
"""Nodes that look at no element."""


class _Rows(NamedTuple):
    """A cache of the narrow type, and its scales where it is of codes."""

    rows: ir.Value
    scale: ir.Value | None


def narrow_caches(model: onnx.ModelProto, cache_dtype: CacheType) -> onnx.ModelProto:
    """The program with caches of this type; with int8 it takes `key_scale`, `value_scale` and returns both `_out`.

    A program that only reads caches gets them widened; one without caches stays as it is.

    Raises:
        SemkvError: when it writes a cache that it does not take.
    """
    if cache_dtype == "float32":
        return model
    wide = ir.from_proto(model)
    graph = wide.graph
    element = CACHE_ELEMENT[cache_dtype]
    edits = {part: _Narrow(graph, part, element) for part in PARTS}
    narrow: dict[ir.Value, tuple[str, _Rows]] = {}
    """Values that are caches of the narrow type, by the value that the float32 graph has for it, and whose they are."""
    for part, edit in edits.items():
        source = next((value for value in graph.inputs if value.name == f"{part}_cache"), None)
        if source is not None:
            narrow[source] = part, edit.taken(source)
        elif any(value.name == f"{part}_cache_out" for value in graph.outputs):
            raise SemkvError(f"a program without {part}_cache has no other cache type", where=graph.name)
    kept = set()
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type.split("_")[0] in native.SPECS and set(node.inputs[:2]) <= set(narrow):
            _keep(node, element, narrow)
            kept.add(node)
    for value, (part, rows) in list(narrow.items()):
        uses = [use for use in value.uses() if use.node not in kept and use.node.op_type not in OF_ANY_TYPE]
        if uses:
            widened = edits[part].widened(rows)
            for use in uses:
                use.node.replace_input_with(use.idx, widened)
    for part, edit in edits.items():
        at = next((i for i, value in enumerate(graph.outputs) if value.name == f"{part}_cache_out"), None)
        if at is not None:
            result = graph.outputs[at]
            edit.give(at, narrow[result][1] if result in narrow else None)
    graph.sort()
    return ir.to_proto(wide)


def _keep(node: ir.Node, element: ir.DataType, narrow: dict[ir.Value, tuple[str, _Rows]]) -> None:
    """Gives a node the form for narrow caches, and notes that its first two outputs are such."""
    parts = [narrow[value] for value in node.inputs[:2] if value is not None]
    caches = node.outputs[: len(parts)]
    scales: list[ir.Value | None] = [None] * len(parts)
    if element == ir.DataType.INT8:
        node.op_type += "_int8"
        inputs, outputs = len(node.inputs), len(node.outputs)
        node.resize_inputs(inputs + len(parts))
        for number, (_, narrowed) in enumerate(parts):
            node.replace_input_with(inputs + number, narrowed.scale)
        node.resize_outputs(outputs + len(parts))
        for number, cache in enumerate(caches):
            made = scales[number] = node.outputs[outputs + number]
            made.name, made.type = f"{cache.name}.scale", ir.TensorType(ir.DataType.FLOAT)
    for cache, scale, (part, _) in zip(caches, scales, parts, strict=True):
        cache.type = ir.TensorType(element)
        narrow[cache] = part, _Rows(cache, scale)


class _Narrow:
    """One of the two caches."""

    def __init__(self, graph: ir.Graph, part: str, element: ir.DataType) -> None:
        self.graph, self.part, self.element = graph, part, element
        self.scaled = element == ir.DataType.INT8

    def taken(self, source: ir.Value) -> _Rows:
        """The graph's input, and its scales, which become one more."""
        source.dtype = self.element
        if not self.scaled:
            return _Rows(source, None)
        assert source.shape is not None
        shape = ir.Shape(source.shape[:3])
        scale = ir.Value(name=f"{self.part}_scale", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        self.graph.inputs.append(scale)
        return _Rows(source, scale)

    def widened(self, narrow: _Rows) -> ir.Value:
        rows = self._node("Cast", narrow.rows, to=int(ir.DataType.FLOAT))
        if narrow.scale is None:
            return rows
        return self._node("Mul", rows, self._node("Unsqueeze", narrow.scale, self._constant("last", [-1], np.int64)))

    def give(self, at: int, kept: _Rows | None) -> None:
        """Makes output `at` of the graph narrow: what is so already, or else what its rows become."""
        result = self.graph.outputs[at]
        shape, name = result.shape, f"{self.part}_cache_out"
        if kept is None:
            result.name = f"{name}.wide"
            kept = self._narrowed(result)
        self.graph.outputs[at] = kept.rows
        kept.rows.name, kept.rows.shape, kept.rows.type = name, shape, ir.TensorType(self.element)
        if kept.scale is not None:
            kept.scale.name, kept.scale.type = f"{self.part}_scale_out", ir.TensorType(ir.DataType.FLOAT)
            kept.scale.shape = None if shape is None else ir.Shape(shape[:3])
            self.graph.outputs.append(kept.scale)

    def _node(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or None)
        node.outputs[0].name = f"{self.part}_cache.{op_type}.{len(self.graph)}"
        self.graph.append(node)
        return node.outputs[0]

    def _constant(self, name: str, array: object, dtype: type) -> ir.Value:
        name = f"{self.part}_cache.{name}"
        if name not in self.graph.initializers:
            values: NDArray[Any] = np.asarray(array, dtype)
            tensor = ir.tensor(values, name=name)
            shape = ir.Shape(values.shape)
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _narrowed(self, rows: ir.Value) -> _Rows:
        if not self.scaled:
            return _Rows(self._node("Cast", rows, to=int(self.element)), None)
        # As NexusAttention's body quantises: the largest magnitude becomes 127; a row of zeros has scale 0 and codes 0.
        axis, zero = self._constant("last", [-1], np.int64), self._constant("zero", 0.0, np.float32)
        limit, one = self._constant("limit", CODE_LIMIT, np.float32), self._constant("one", 1.0, np.float32)
        step = self._node("Div", self._node("ReduceMax", self._node("Abs", rows), axis, keepdims=1), limit)
        divisor = self._node("Where", self._node("Greater", step, zero), step, one)
        ratio = self._node("Round", self._node("Div", rows, divisor))
        floor = self._constant("floor", -CODE_LIMIT, np.float32)
        codes = self._node("Cast", self._node("Clip", ratio, floor, limit), to=int(self.element))
        return _Rows(codes, self._node("Squeeze", step, axis))

"""A compressor of float32 caches for caches of another type: rows are widened, compressed in float32, and narrowed.

A slot that is kept comes out as it went in: widening loses nothing, and narrowing gives back what was narrow (int8: the
same codes, a scale within rounding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.passes.keep_native import CACHE_ELEMENT, PARTS

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from semkv_deploy.choices import CacheType

CODE_LIMIT = 127.0


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
    for part in PARTS:
        source = next((value for value in graph.inputs if value.name == f"{part}_cache"), None)
        at = next((i for i, value in enumerate(graph.outputs) if value.name == f"{part}_cache_out"), None)
        if source is None and at is not None:
            raise SemkvError(f"a program without {part}_cache has no other cache type", where=graph.name)
        if source is None:
            continue
        _Narrow(graph, part, CACHE_ELEMENT[cache_dtype]).apply(source, at)
    graph.sort()
    return ir.to_proto(wide)


class _Narrow:
    """One of the two caches."""

    def __init__(self, graph: ir.Graph, part: str, element: ir.DataType) -> None:
        self.graph, self.part, self.element = graph, part, element
        self.scaled = element == ir.DataType.INT8

    def apply(self, source: ir.Value, at: int | None) -> None:
        uses = list(source.uses())
        widened = self._widened(source)
        for node, index in uses:
            node.replace_input_with(index, widened)
        source.dtype = self.element
        if at is None:
            return
        result = self.graph.outputs[at]
        result.name, shape = f"{self.part}_cache_out.wide", result.shape
        self.graph.outputs[at] = narrow = self._narrowed(result)
        narrow.name, narrow.shape, narrow.type = f"{self.part}_cache_out", shape, ir.TensorType(self.element)

    def _node(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or None)
        node.outputs[0].name = f"{self.part}_cache.{op_type}.{len(self.graph)}"
        self.graph.append(node)
        return node.outputs[0]

    def _constant(self, name: str, array: object, dtype: type) -> ir.Value:
        values: NDArray[Any] = np.asarray(array, dtype)
        tensor = ir.tensor(values, name=f"{self.part}_cache.{name}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def _widened(self, source: ir.Value) -> ir.Value:
        rows = self._node("Cast", source, to=int(ir.DataType.FLOAT))
        if not self.scaled:
            return rows
        assert source.shape is not None
        scale = ir.Value(
            name=f"{self.part}_scale", shape=ir.Shape(source.shape[:3]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        self.graph.inputs.append(scale)
        return self._node("Mul", rows, self._node("Unsqueeze", scale, self._constant("last", [-1], np.int64)))

    def _narrowed(self, rows: ir.Value) -> ir.Value:
        if not self.scaled:
            return self._node("Cast", rows, to=int(self.element))
        # As NexusAttention's body quantises: the largest magnitude becomes 127; a row of zeros has scale 0 and codes 0.
        axis, zero = self._constant("axis", [-1], np.int64), self._constant("zero", 0.0, np.float32)
        limit, one = self._constant("limit", CODE_LIMIT, np.float32), self._constant("one", 1.0, np.float32)
        step = self._node("Div", self._node("ReduceMax", self._node("Abs", rows), axis, keepdims=1), limit)
        divisor = self._node("Where", self._node("Greater", step, zero), step, one)
        ratio = self._node("Round", self._node("Div", rows, divisor))
        scale = self._node("Squeeze", step, axis)
        scale.name, scale.type = f"{self.part}_scale_out", ir.TensorType(ir.DataType.FLOAT)
        scale.shape = None if rows.shape is None else ir.Shape(rows.shape[:3])
        self.graph.outputs.append(scale)
        floor = self._constant("floor", -CODE_LIMIT, np.float32)
        return self._node("Cast", self._node("Clip", ratio, floor, limit), to=int(self.element))

"""From the graph as traced to the graph as shipped: constants folded, no shape arithmetic, names that mean something.

Everything here keeps the graph's meaning, and the result depends on the model only: symbol numbers, trace-time names
and source locations are gone.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer

from semkv_deploy import ops
from semkv_deploy.errors import SemkvError
from semkv_deploy.model.names import cache_names
from semkv_deploy.ops import nexus_attention as nexus


def tidy(model: ir.Model, dims: Mapping[tuple[str, int], str], layers: int) -> None:
    """Cleans a traced decoder in place and gives it the operator's function.

    Args:
        model: as `trace_decoder` returns it.
        dims: names of the free sizes: (graph input, axis) -> name.
        layers: how many NexusAttention nodes there must be.

    Raises:
        SemkvError: when the graph does not have exactly one NexusAttention per layer, or a size is not free.
    """
    graph = model.graph
    _rename_dims(graph, dims)
    _transpose_weights(graph)
    # What is left to transpose is a tied embedding: folded, it would be stored twice.
    onnxscript.optimizer.fold_constants(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    _drop_no_ops(graph)
    _static_reshapes(graph)
    _sizes_from_first_input(graph)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _name_everything(graph)
    _check_attention(graph, layers)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for value in _values(graph):
        value.metadata_props.clear()
        value.meta.clear()
    function = ir.serde.deserialize_function(nexus.function_proto())
    model.functions.clear()
    model.functions[function.identifier()] = function
    graph.opset_imports.clear()
    graph.opset_imports.update({"": ops.OPSET, ops.DOMAIN: ops.VERSION})


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _rename_dims(graph: ir.Graph, dims: Mapping[tuple[str, int], str]) -> None:
    """Give the tracer's symbols (s11) their names; a size computed from several becomes unknown."""
    inputs = {value.name: value for value in graph.inputs}
    names: dict[str, str] = {}
    for (name, axis), dim in dims.items():
        shape = inputs[name].shape
        symbol = None if shape is None else shape[axis]
        if not isinstance(symbol, ir.SymbolicDim) or symbol.value is None:
            raise SemkvError("the tracer fixed a size that must stay free", where=f"{name}, axis {axis}", got=symbol)
        names[symbol.value] = dim
    if len(set(names.values())) != len(names):
        raise SemkvError("the tracer took one size for two", where="decoder inputs", got=names)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape(
                names.get(size.value or "") if isinstance(size, ir.SymbolicDim) else size for size in value.shape
            )


def _transpose_weights(graph: ir.Graph) -> None:
    """Store a linear layer's weight as MatMul wants it, [in, out], when the transpose is its only use.

    A weight that is also an embedding is kept once, as the embedding; its Transpose stays in the graph for the runtime
    to fold. The new tensor is computed when it is written, so weights are never in memory twice.
    """
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not source.is_initializer() or len(source.uses()) != 1 or source.const_value is None:
            continue
        permutation = node.attributes["perm"].as_ints()
        tensor, output = source.const_value, node.outputs[0]
        array = tensor.numpy()  # a view of the model's weight
        shape = ir.Shape(array.transpose(permutation).shape)
        assert source.name is not None
        weight = ir.Value(name=source.name, shape=shape, type=source.type)
        transposed = functools.partial(_transposed, tensor, permutation)
        weight.const_value = ir.LazyTensor(transposed, dtype=tensor.dtype, shape=shape, name=source.name)
        output.replace_all_uses_with(weight)
        graph.remove(node, safe=True)
        del graph.initializers[source.name]
        graph.register_initializer(weight)


def _transposed(tensor: ir.TensorProtocol, permutation: Sequence[int]) -> ir.Tensor:
    return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(permutation)), dtype=tensor.dtype)


def _shape_source(value: ir.Value) -> ir.SymbolicDim | int | None:
    """The size behind a value that is one element of a `Shape`, possibly squeezed or reshaped since, or None."""
    node = value.producer()
    while node is not None and node.op_type in ("Squeeze", "Unsqueeze", "Reshape") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Shape" or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return node.inputs[0].shape[start] if end == start + 1 else None


def _drop_no_ops(graph: ir.Graph) -> None:
    """Remove slices that take everything and products with 1 (a rotary scaling that is off)."""
    for node in list(graph):
        constants = [None if v is None else ir.convenience.get_const_tensor(v) for v in node.inputs]
        source: ir.Value | None = None
        if node.op_type == "Slice" and len(constants) == 5 and None not in constants[1:]:
            starts, ends, _, steps = (tensor.numpy() for tensor in constants[1:] if tensor is not None)
            if (starts == 0).all() and (ends >= 2**31 - 1).all() and (steps == 1).all():
                source = node.inputs[0]
        elif node.op_type == "Mul":
            for factor, other in ((0, 1), (1, 0)):
                tensor = constants[factor]
                if tensor is not None and tensor.size == 1 and tensor.shape.rank() == 0 and tensor.numpy() == 1:
                    source = node.inputs[other]
        if source is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(source)
            graph.remove(node, safe=True)


def _static_reshapes(graph: ir.Graph) -> None:
    """Reshape targets put together from sizes become constants: 0 copies a size of the input, -1 takes what is left.

    No graph input's size is then read to do it, which keeps the graph right when a pass folds batch into heads.
    """
    for node in list(graph):
        target = node.inputs[1].producer() if node.op_type == "Reshape" and node.inputs[1] is not None else None
        data = node.inputs[0]
        if target is None or target.op_type != "Concat" or data is None or data.shape is None:
            continue
        sizes: list[int] = []
        unknown = 0
        for piece in target.inputs:
            assert piece is not None
            constant = ir.convenience.get_const_tensor(piece)
            if constant is not None:
                sizes += constant.numpy().tolist()
                continue
            size, axis = _shape_source(piece), len(sizes)
            if isinstance(size, ir.SymbolicDim) and size.value and axis < len(data.shape) and data.shape[axis] == size:
                sizes.append(0)
            else:
                sizes.append(-1)
                unknown += 1
        if unknown and sizes.count(-1) > 1:
            continue
        name = f"{node.name}.shape"
        shape = ir.Value(name=name, shape=ir.Shape([len(sizes)]), type=ir.TensorType(ir.DataType.INT64))
        shape.const_value = ir.tensor(sizes, dtype=ir.DataType.INT64, name=name)
        graph.register_initializer(shape)
        node.replace_input_with(1, shape)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _sizes_from_first_input(graph: ir.Graph) -> None:
    """Point what is left of `Shape` nodes on graph inputs at the first input (input_ids), which has batch and sequence.

    Raises:
        SemkvError: when a graph input's size is read that input_ids does not have (the capacity, above all).
    """
    first = graph.inputs[0]
    assert first.shape is not None
    for node in graph:
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is None or not source.is_graph_input() or source is first or not node.outputs[0].uses():
            continue
        size = _shape_source(node.outputs[0])
        axis = next((i for i, dim in enumerate(first.shape) if dim == size), None)
        if axis is None:
            raise SemkvError("the graph computes with an input's size", where=source.name, expected="batch or sequence")
        node.replace_input_with(0, first)
        node.attributes["start"] = ir.AttrInt64("start", axis)
        node.attributes["end"] = ir.AttrInt64("end", axis + 1)


_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)(?=\.|$)")


def _scope(node: ir.Node) -> str:
    """The module a node was traced in: "layers.00.self_attn.q_proj", or "" for the top level."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    except (SyntaxError, ValueError):
        scopes = []
    inside = [scope for scope in scopes[:-1] if not scope.startswith("_")]
    return _plain(inside[-1]) if inside else ""


def _plain(name: str) -> str:
    """A module or parameter name without the wrapper's and the base model's prefix, layer numbers in two digits."""
    parts = name.split(".")
    name = ".".join(parts[2:] if parts[:2] == ["model", "model"] else parts[1:] if parts[0] == "model" else parts)
    layer = _LAYER.match(name)
    return name if layer is None else f"layers.{int(layer[1]):02d}{name[layer.end() :]}"


def _name_everything(graph: ir.Graph) -> None:
    """Names from modules: nodes "layers.00.mlp.up_proj/MatMul", values after their node, weights as in the model."""
    kept = {value.name for value in (*graph.inputs, *graph.outputs)}
    count: Counter[str] = Counter()

    def unique(name: str) -> str:
        count[name] += 1
        return name if count[name] == 1 else f"{name}_{count[name] - 1}"

    layer = 0
    for node in graph:
        if node.op_type == nexus.OP.name and node.domain == ops.DOMAIN:
            node.name = f"layers.{layer:02d}.attention"
            layer += 1
        else:
            node.name = unique(f"{_scope(node)}/{node.op_type}".lstrip("/"))
        for index, output in enumerate(node.outputs):
            if output.name not in kept:
                output.name = node.name if index == 0 else f"{node.name}.{index}"
    weights = list(graph.initializers.values())
    graph.initializers.clear()
    constants = 0
    for value in weights:
        assert value.name is not None and value.const_value is not None
        if value.name.startswith("model."):
            value.name = unique(_plain(value.name))
        else:
            value.name = f"constants.{constants:02d}"
            constants += 1
        value.const_value.name = value.name
        graph.register_initializer(value)


def _check_attention(graph: ir.Graph, layers: int) -> None:
    found = [node for node in graph if node.domain == ops.DOMAIN]
    foreign = sorted({node.domain for node in graph} - {"", ops.DOMAIN})
    if foreign:
        raise SemkvError("the graph has operators of a foreign domain", where="decoder", got=foreign)
    if len(found) != layers or any(node.op_type != nexus.OP.name for node in found):
        raise SemkvError(
            "the graph must have exactly one attention node per layer",
            where="decoder",
            expected=f"{layers} x {ops.DOMAIN}::{nexus.OP.name}",
            got=[node.op_type for node in found],
        )
    for layer, node in enumerate(found):
        if node.inputs[3] is None or node.inputs[3].name != cache_names(layer, layers)[0]:
            raise SemkvError("attention layers are out of order", where=node.name)

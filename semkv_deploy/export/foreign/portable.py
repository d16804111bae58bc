"""From a stranger's decoder to our portable graph: same weights, our inputs, outputs and attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import version_converter

from semkv_deploy import ops
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.eight_bits import unsigned_activations
from semkv_deploy.export.foreign.in_place import InPlace
from semkv_deploy.export.foreign.interface import Interface
from semkv_deploy.export.foreign.layers import CONTRIB
from semkv_deploy.export.foreign.norms import expand_norms
from semkv_deploy.export.foreign.positions import Tables
from semkv_deploy.graph.editing import GraphEditor, attribute, sole, static
from semkv_deploy.graph.files import INLINE_LIMIT
from semkv_deploy.graph.inference import infer_types
from semkv_deploy.model.names import INPUT_IDS, LENGTH, LOGITS, LOGITS_INDEX, POSITION_IDS, cache_names, present_names
from semkv_deploy.ops import nexus_attention as nexus

_SLOTS = 2
"""Axis of a cache's slots."""


def to_portable(model: ir.Model, roles: Interface, head_dim: int) -> None:
    """Rewrites a decoder of these roles in place.

    Raises:
        SemkvError: naming the node that cannot be taken.
    """
    graph = model.graph
    expand_norms(graph)
    unsigned_activations(graph)
    version_converter.convert_version(model, ops.OPSET)
    _replace_attention(graph, roles, head_dim)
    _wanted_rows(graph, roles)
    common.RemoveUnusedNodesPass()(model)
    _drop_inputs(graph, roles)
    _check_sizes(roles)
    _finish(model)


def _input(name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _replace_attention(graph: ir.Graph, roles: Interface, head_dim: int) -> None:
    edit = GraphEditor(graph, "foreign")
    layers, first = len(roles.layers), next(iter(graph))
    positions = roles.positions or _input(POSITION_IDS, ir.DataType.INT64, ["batch", "sequence"])
    lengths = _input(LENGTH, ir.DataType.INT64, [layers, "batch"])
    index = _input(LOGITS_INDEX, ir.DataType.INT64, ["batch", "rows"])
    for value in (roles.ids, positions):
        value.shape = ir.Shape(["batch", "sequence"])
        if value.dtype != ir.DataType.INT64:
            raise SemkvError("ids or positions of another type", where=value.name, expected="int64", got=value.dtype)
    for value, ones in roles.counted:
        told = positions
        if ones:
            told = edit.node(first, "Unsqueeze", [positions, edit.constant(ones, np.int64)])[0]
        value.replace_all_uses_with(told)
    roles.ids.name, positions.name = INPUT_IDS, POSITION_IDS
    tables = Tables(edit, first, positions)
    inputs = [roles.ids, positions, index, lengths]
    outputs = [roles.logits]
    made: list[ir.Node] = []
    for number, layer in enumerate(roles.layers):
        shape: list[str | int] = ["batch", layer.kv_heads, "capacity", head_dim]
        names = cache_names(number, layers)
        bias = _input(names[2], ir.DataType.FLOAT, shape[:3])
        row = edit.node(layer.node, "Gather", [lengths, edit.constant(number, np.int64)], axis=0)[0]
        made.append(layer.replace(edit, tables, head_dim, bias, row))
        for value, name in zip(layer.past, names[:2], strict=True):
            if value.dtype != ir.DataType.FLOAT:
                raise SemkvError("caches of another type", where=value.name, expected="float32", got=value.dtype)
            value.name, value.shape = name, ir.Shape(shape)
        inputs += [*layer.past, bias]
    for number, node in enumerate(made):
        node.name = f"layers.{number:02d}.attention"
        for output, name in zip(node.outputs[1:], present_names(number, layers), strict=True):
            cache = node.inputs[3]
            assert cache is not None
            output.name, output.shape, output.type = name, cache.shape, cache.type
            outputs.append(output)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    kept = [value for value in graph.inputs if value is roles.mask or value in roles.counts]
    graph.inputs.clear()
    graph.inputs.extend([*inputs, *kept])


def _wanted_rows(graph: ir.Graph, roles: Interface) -> None:
    """Takes rows `logits_index` [B,R] of the hidden states before the head; after it, where no head is recognised."""
    logits, index = roles.logits, graph.inputs[2]
    edit = GraphEditor(graph, "rows")
    head = sole(logits, "MatMul") or sole(logits, "MatMulNBits", CONTRIB)
    axis = edit.constant([-1], np.int64)
    vocabulary = logits.shape[-1] if logits.shape is not None else None
    if head is not None:
        reader = head
        while earlier := sole(reader.inputs[0], "DequantizeLinear") or sole(reader.inputs[0], "QuantizeLinear"):
            reader = earlier  # what rounds the head's rows stays beside it: runtimes take all of it as one product
        places = edit.node(reader, "Unsqueeze", [index, axis])[0]
        reader.replace_input_with(0, edit.node(reader, "GatherND", [reader.inputs[0], places], batch_dims=1)[0])
        last = logits
    else:
        places = edit.node(None, "Unsqueeze", [index, axis])[0]
        last = edit.node(None, "GatherND", [logits, places], batch_dims=1)[0]
        last.type = logits.type
        logits.name = f"{LOGITS}.all"
    last.name, last.shape = LOGITS, ir.Shape(["batch", "rows", vocabulary])
    graph.outputs[0] = last


def _drop_inputs(graph: ir.Graph, roles: Interface) -> None:
    """Takes the mask's and the counts' inputs away; what only made sizes of them is gone with the attention.

    Raises:
        SemkvError: naming what else reads one of them.
    """
    for value in (roles.mask, *roles.counts):
        if value is None:
            continue
        readers = [use.node for use in value.uses()]
        if readers and value is roles.mask:
            raise SemkvError("the attention mask is read by more than attention", where=readers[0].name)
        if readers:
            raise SemkvError(
                "the graph counts positions by the length of its cache",
                where=readers[0].name,
                expected="positions by an input position_ids",
                got=value.name,
                fix="export it with position_ids as an input",
            )
        graph.inputs.remove(value)


def _check_sizes(roles: Interface) -> None:
    """Fails where the graph still asks how long a cache is: it has the size of its capacity now.

    Raises:
        SemkvError: naming the node.
    """
    for layer, cache in [(each, cache) for each in roles.layers for cache in each.past]:
        for use in cache.uses():
            # One in place may have had another number of dimensions.
            if use.node.domain != ops.DOMAIN and (isinstance(layer, InPlace) or _reads_length(use.node)):
                raise SemkvError(
                    "the graph counts positions by the length of its cache",
                    where=use.node.name,
                    expected="positions by an input position_ids",
                    fix="export it with position_ids as an input",
                )


def _reads_length(shape: ir.Node) -> bool:
    """Whether a Shape of a cache tells how many slots it has, and not rows, heads or sizes alone."""
    first, last = attribute(shape, "start", 0) % 4, attribute(shape, "end", 4)
    axes = list(range(4))[first:last]
    if _SLOTS not in axes:
        return False
    picks = [use.node for use in shape.outputs[0].uses()]
    if any(pick.op_type != "Gather" for pick in picks):
        return True
    indices = [None if (given := pick.inputs[1]) is None else ir.convenience.get_const_tensor(given) for pick in picks]
    return any(index is None or axes.index(_SLOTS) in index.numpy() % len(axes) for index in indices)


def _finish(model: ir.Model) -> None:
    graph = model.graph
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.ClearMetadataAndDocStringPass()(model)
    common.TopologicalSortPass()(model)
    for value in (value for node in graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None  # in the exporter's symbols, of a cache that grows
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < INLINE_LIMIT:
            value.const_value = ir.Tensor(tensor.numpy().copy(), name=value.name)  # `write_model` keeps these inline
    function = ir.serde.deserialize_function(nexus.function_proto())
    model.functions[function.identifier()] = function
    contrib = any(node.domain == CONTRIB for node in graph)
    graph.opset_imports.clear()
    graph.opset_imports.update({"": ops.OPSET, ops.DOMAIN: ops.VERSION} | ({CONTRIB: 1} if contrib else {}))
    model.ir_version = 10
    infer_types(model)
    for node in graph:
        if node.domain == ops.DOMAIN:
            query = node.inputs[0]
            assert query is not None
            static(query, 1)

"""Writes the graphs that TensorRT parses: decoders over one file of weights, and compressors."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import DOMAIN

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from semkv_deploy.choices import DType
    from semkv_deploy.methods.base import BiasMode
    from semkv_deploy.passes.lower_native import Promise

WEIGHTS = "decoder.onnx.data"
IR_VERSION = 10
"""Importers of 2025 take it; nothing here needs a newer one."""


class Lowered(NamedTuple):
    """A graph on disk: its alias map and the layers that TensorRT must make of it."""

    path: Path
    aliases: dict[str, str]
    promises: list[Promise]


def write_weights(portable: Path, folder: Path, dtype: DType) -> tuple[bytes, int]:
    """The decoder in its final type, weights written to `folder`; the graph itself is returned, not yet lowered.

    Returns:
        The serialised graph, with `semkv::NexusAttention` nodes, and the bytes of its weights.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    from semkv_deploy.graph.files import write_model
    from semkv_deploy.passes.precision import convert_floats
    from semkv_deploy.passes.selection import choose_always

    model = ir.load(portable)
    choose_always(model)
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    common.ShapeInferencePass()(model)
    convert_floats(model, dtype)
    common.RemoveUnusedNodesPass()(model)
    model.ir_version = IR_VERSION
    graph = folder / WEIGHTS.removesuffix(".data")
    write_model(model, graph)
    data = graph.read_bytes()
    graph.unlink()
    return data, (folder / WEIGHTS).stat().st_size


def lower_decoder(
    graph: bytes, path: Path, *, bias: BiasMode, dims: Mapping[str, int], plugins: Collection[str] = ()
) -> Lowered:
    """One decoder graph for TensorRT, written beside the weights.

    Args:
        graph: from `write_weights`.
        dims: static sizes by symbol (batch, sequence, rows, capacities, the method's); every capacity must be there.
            With one row, a method that selects chooses slots; with more, or any number, it attends to all.
        plugins: operators that stay as plugin nodes.
    """
    import onnx
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    from semkv_deploy.lint.aliases import alias_map, check_alias_safety
    from semkv_deploy.passes.inline_select import inline_selection
    from semkv_deploy.passes.lower_native import Promise, lower_to_native, set_dims
    from semkv_deploy.passes.plugin_nodes import keep_as_plugins
    from semkv_deploy.passes.selection import attend_to_all

    model = ir.from_proto(onnx.ModelProto.FromString(graph))
    if dims.get("sequence") != 1:
        attend_to_all(model)
    set_dims(model, dims)
    promises = []
    if "SemanticBlockSelect" not in plugins:
        promises += [Promise("TOPK", name) for name in inline_selection(model)]
    promises += keep_as_plugins(model, set(plugins), bias=bias, dims=dims)
    if "NexusAttention" not in plugins:
        promises += lower_to_native(model, bias=bias, dims=dims)
    _check_complete(model, plugins, path.name)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    proto = ir.to_proto(model)
    aliases = alias_map(proto.graph)
    check_alias_safety(proto.graph, aliases)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return Lowered(path, aliases, promises)


def lower_compressor(
    portable: onnx.ModelProto,
    path: Path,
    *,
    batch: int,
    capacity: int,
    levels: int,
    symbols: Mapping[str, int] = MappingProxyType({}),
    plugins: Collection[str] = (),
) -> Lowered:
    """A group's program for TensorRT, every shape static.

    Args:
        portable: a method's program; it is changed.
        levels: length of the input thresholds.
        symbols: other sizes, by symbol.
    """
    import onnx.inliner
    import onnx_ir as ir
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import optimize

    from semkv_deploy.methods import merging
    from semkv_deploy.passes import static_cluster, static_merging
    from semkv_deploy.passes.lower_native import set_dims
    from semkv_deploy.passes.plugin_nodes import keep_as_plugins

    static = {"SemanticCluster": static_cluster.function_proto, merging.FUNCTION: static_merging.function_proto}
    functions = [
        static[function.name]() if function.name in static else function
        for function in portable.functions
        if function.name not in plugins
    ]
    del portable.functions[:]
    portable.functions.extend(functions)
    # One body per node: a function shared by two nodes would give two nodes one name.
    inlined = onnx.inliner.inline_local_functions(portable)
    model = ir.from_proto(inlined)
    set_dims(model, {"batch": batch, "capacity": capacity, "levels": levels, **symbols})
    common.ShapeInferencePass()(model)
    optimize(model, num_iterations=3)
    # After the optimiser, which would take away the copies that plugins need.
    promises = keep_as_plugins(model, set(plugins), bias="head", dims={})
    _check_complete(model, plugins, path.name)
    _name_nodes(model.graph)
    model.ir_version = IR_VERSION
    for domain in {merging.FUNCTION_DOMAIN} | (set() if promises else {DOMAIN}):
        model.opset_imports.pop(domain, None)
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return Lowered(path, {}, promises)


def _check_complete(model: ir.Model, plugins: Collection[str], where: str) -> None:
    """Fails where an operator of the `semkv` domain is neither lowered nor asked for as a plugin."""
    left = [node.name for node in model.graph if node.domain == DOMAIN and node.op_type not in plugins]
    if left:
        raise SemkvError("operators of domain semkv are left", where=where, expected="standard operators", got=left[:3])


def _name_nodes(graph: ir.Graph | ir.Function) -> None:
    """Unique names for all nodes, subgraphs included: TensorRT cannot tell nodes of one name apart."""
    numbers = itertools.count()

    def name(nodes: ir.Graph | ir.Function) -> None:
        for node in nodes:
            if not (node.name or "").startswith("plugin."):
                node.name = f"{node.op_type}_{next(numbers)}"
            for attribute in node.attributes.values():
                if attribute.type.name == "GRAPH":
                    name(attribute.as_graph())

    name(graph)

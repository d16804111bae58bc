"""Marks `semkv` nodes as TensorRT plugins: the importer takes the creator that these attributes name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import GraphEditor
from semkv_deploy.methods.base import BiasMode
from semkv_deploy.ops import DOMAIN, SPECS
from semkv_deploy.passes.lower_native import Promise, set_dims

NAMESPACE, VERSION = "semkv", "1"
"""Of the plugin creators in `plugins/`."""

WRITTEN_IN_PLACE = ("key_cache", "value_cache", "slot_bias")
"""Inputs that a plugin may give back as outputs, in the same buffer."""


def keep_as_plugins(
    model: ir.Model, operators: Collection[str], *, bias: BiasMode, dims: Mapping[str, int]
) -> list[Promise]:
    """Gives nodes of `operators` the plugin's attributes, in place, and every attribute its value.

    The importer hands a creator what the node has, so that defaults are written out. Local functions of the operators
    must be gone: where a creator is not registered, a function would be inlined without a word.

    Args:
        bias: with "none" the slot biases become zeros of the right shape, because a plugin has all its inputs.
        dims: static sizes by symbol.

    Returns:
        The plugin layers that TensorRT must have.

    Raises:
        SemkvError: an attribute that the operator does not have, of another type, or too large for a plugin's field.
    """
    set_dims(model, dims)
    edit = GraphEditor(model.graph, "plugin_copy")
    cache = next(
        value.dtype
        for value in model.graph.inputs
        if value.dtype is not None and (value.name or "").endswith(("key_cache", ".key"))
    )
    promises = []
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type in operators]
    for number, node in enumerate(nodes):
        _check_attributes(node)
        # Options are attributes; the importer knows no overloads.
        node.overload = ""
        for name, default in SPECS[node.op_type].attributes.items():
            if name not in node.attributes:
                attribute = ir.AttrInt64 if isinstance(default, int) else ir.AttrFloat32
                node.attributes[name] = attribute(name, default)  # type: ignore[arg-type]
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", NAMESPACE)
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", VERSION)
        if not (node.name or "").startswith("layers."):
            node.name = f"plugin.{node.op_type}.{number}"
        promises.append(Promise("PLUGIN_V3", node.name or ""))
        _keep_for_other_readers(node, edit, cache)
    return promises


def _check_attributes(node: ir.Node) -> None:
    """The importer asks a node for the attributes that the creator lists, and passes over all others without a word."""
    spec, where = SPECS[node.op_type], f"node {node.name or node.op_type}"
    defaults = {**spec.attributes, **{option.name: 1 for option in spec.options}}
    for name, attribute in node.attributes.items():
        if name in ("plugin_namespace", "plugin_version"):
            continue
        if name not in defaults:
            raise SemkvError(
                f"{spec.name} has no attribute {name}", where=where, expected=sorted(defaults), got=attribute.value
            )
        wanted = ir.AttributeType.INT if isinstance(defaults[name], int) else ir.AttributeType.FLOAT
        if attribute.type != wanted:
            raise SemkvError(
                f"attribute {name} of {spec.name} has the wrong type",
                where=where,
                expected=wanted.name.lower(),
                got=attribute.type.name.lower(),
            )
        if wanted == ir.AttributeType.INT and not -(2**31) <= attribute.as_int() < 2**31:
            raise SemkvError(
                f"attribute {name} of {spec.name} is out of range",
                where=where,
                expected="a number of 32 bits",
                got=attribute.as_int(),
            )


def _keep_for_other_readers(node: ir.Node, edit: GraphEditor, cache: ir.DataType) -> None:
    """Gives the plugin a copy of what it overwrites and others read.

    The builder would insert the copy itself, which takes a GPU ("Cannot reformat", RTX 1.7.1). Caches of a decoder have
    one reader, so that nothing is copied there.
    """
    spec = SPECS[node.op_type]
    outputs = {output.removesuffix("_out") for output in spec.output_names}
    for index, name in enumerate(spec.input_names[: len(node.inputs)]):
        value = node.inputs[index]
        if name not in WRITTEN_IN_PLACE or name not in outputs or value is None or len(value.uses()) < 2:
            continue
        element = cache if spec.inputs[index].dtype == "T" else ir.DataType.FLOAT
        # A product with 1 is a copy bit for bit, and stays one: Identity would be removed.
        (copy,) = edit.node(node, "Mul", [value, edit.constant(1.0, element.numpy())])
        copy.shape, copy.type = value.shape, ir.TensorType(element)
        node.replace_input_with(index, copy)

"""Marks `semkv` nodes as TensorRT plugins: the importer takes the creator that these attributes name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from semkv_deploy.ops import DOMAIN, SPECS
from semkv_deploy.passes.gqa import BiasMode
from semkv_deploy.passes.native import Promise, set_dims

NAMESPACE, VERSION = "semkv", "1"
"""Of the plugin creators in `plugins/`."""


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
    """
    set_dims(model, dims)
    promises = []
    for number, node in enumerate(node for node in model.graph if node.domain == DOMAIN and node.op_type in operators):
        for name, default in SPECS[node.op_type].attributes.items():
            if name not in node.attributes:
                attribute = ir.AttrInt64 if isinstance(default, int) else ir.AttrFloat32
                node.attributes[name] = attribute(name, default)  # type: ignore[arg-type]
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", NAMESPACE)
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", VERSION)
        if not (node.name or "").startswith("layers."):
            node.name = f"plugin.{node.op_type}.{number}"
        promises.append(Promise("PLUGIN_V3", node.name or ""))
    return promises

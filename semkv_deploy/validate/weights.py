"""The same weights on both sides, so that a comparison is of graphs and not of rounding.

A bundle holds float32 weights in the portable decoder and rounded ones in a target. Three rewrites make them equal:
the portable decoder with the target's weights (after each was shown to be the portable one rounded), the target with
float32 activations, and a float16 or bfloat16 graph in float32. A fourth gives it float32 caches, a fifth makes plugin
nodes run anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.external import save_with_data
from semkv_deploy.graph.products import use_float32_activations
from semkv_deploy.model import names
from semkv_deploy.ops import DOMAIN, function_protos, nexus_attention

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

HALF_TYPES = ("float16", "bfloat16")

ROUNDED = 1.01
"""Quantisation steps that a weight may be away from its original (the largest of a block may be clipped by one)."""


def with_target_weights(portable: Path, target: Path, folder: Path) -> Path:
    """The portable decoder with the weights of a target, dequantised or rounded, written to `folder`.

    Raises:
        SemkvError: when a weight of the target has no product in the portable decoder, or is not that product's weight
            rounded: then the target has other weights than the model.
    """
    import onnx
    from onnx import numpy_helper

    model, lowered = onnx.load(portable), onnx.load(target)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    stored = {tensor.name: tensor for tensor in lowered.graph.initializer}
    products = {node.name: node for node in model.graph.node if node.op_type == "MatMul"}
    transposes = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    for node in lowered.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        # onnxruntime's quantiser names a node after the product it replaces.
        product = products.get(node.name.rpartition("_Q")[0])
        if product is None:
            raise SemkvError(
                "quantised product without its original", where=node.name, expected="a MatMul of that name"
            )
        # A tied head is a product by the embedding transposed.
        turned = product.input[1] not in weights
        source = transposes[product.input[1]] if turned else product.input[1]
        original = numpy_helper.to_array(weights[source]).astype(np.float32)
        original = original.T if turned else original
        rounded, step = _dequantized(node, stored)
        _check_rounded(original, rounded, step * ROUNDED, node.input[1])
        name = f"{product.name}.weight_of_target"
        model.graph.initializer.append(numpy_helper.from_array(rounded, name))
        product.input[1] = name
    for name, tensor in weights.items():
        for half in HALF_TYPES:
            if f"{name}/{half}" in stored:
                original = numpy_helper.to_array(tensor).astype(np.float32)
                ours = numpy_helper.to_array(stored[f"{name}/{half}"]).astype(np.float32)
                half_step = np.abs(original) * (2.0**-10 if half == "float16" else 2.0**-7) + 2.0**-24
                _check_rounded(original, ours, half_step, f"{name}/{half}")
                tensor.CopyFrom(numpy_helper.from_array(ours, name))
    readers = {name: node for node in model.graph.node for name in node.input}
    for node in lowered.graph.node:
        if node.op_type != "GatherBlockQuantized":
            continue
        name = node.input[0].removesuffix("_Q8")
        if name not in weights or readers[name].op_type != "Gather":
            raise SemkvError(
                "quantised embedding without its original", where=node.name, expected=f"a Gather of {name}"
            )
        original = numpy_helper.to_array(weights[name]).astype(np.float32)
        rounded, step = _dequantized_table(node, stored)
        _check_rounded(original, rounded, step * ROUNDED, node.input[0])
        weights[name].CopyFrom(numpy_helper.from_array(rounded, name))
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return _save(model, folder, "reference.onnx")


def with_float32_activations(target: Path, folder: Path, name: str) -> Path:
    """A quantised decoder whose products take float32 activations (as shipped they round them to 8 bits)."""
    import onnx

    model = onnx.load(target)
    use_float32_activations(model)
    return _save(model, folder, name)


def in_float32(path: Path, folder: Path) -> Path:
    """A float16 or bfloat16 graph with every tensor in float32; what was rounded in its weights stays rounded."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(path)
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for graph in _graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.data_type in halves:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in halves:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t") and attribute.t.data_type in halves:
                    wide = numpy_helper.to_array(attribute.t).astype(np.float32)
                    attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i in halves:
                    attribute.i = TensorProto.FLOAT
    return _save(model, folder, f"{path.stem}.float32.onnx")


def with_float32_caches(target: Path, folder: Path) -> Path:
    """A decoder of native operators whose caches are float32, without scales."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(target)
    graph = model.graph
    for values in (graph.input, graph.output):
        for value in list(values):
            if ".scale_of_" in value.name:
                values.remove(value)
            elif names.is_cache_input(value.name) or names.is_cache_output(value.name):
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    one = np.ones((1, 1, 1), np.float32)
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type == "NexusAttention_int8":
            node.op_type = "NexusAttention"
            # Others that widen rows find ones where the scales were.
            graph.initializer.extend(numpy_helper.from_array(one, name) for name in node.output[3:])
            del node.input[7:], node.output[3:]
    return _save(model, folder, "float32_caches.onnx")


def with_function_bodies(path: Path, folder: Path) -> Path:
    """A graph whose plugin nodes are calls of their operators' portable bodies, as TensorRT falls back to them."""
    import onnx

    model = onnx.load(path)
    called: set[str] = set()
    variants: dict[str, onnx.FunctionProto] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            options = nexus_attention.options_of(node) if node.op_type == nexus_attention.OP.name else []
            if options:
                body = nexus_attention.function_proto(*options)
                node.overload = body.overload
                variants[body.overload] = body
            else:
                called.add(node.op_type)
            kept = [attribute for attribute in node.attribute if not attribute.name.startswith("plugin_")]
            del node.attribute[:]
            node.attribute.extend(kept)
    model.functions.extend(function for function in function_protos() if function.name in called)
    model.functions.extend(variants.values())
    return _save(model, folder, f"{path.stem}.bodies.onnx")


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those in its loops and conditions."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _dequantized(node: onnx.NodeProto, stored: dict[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights `[K,N]` of a `MatMulNBits` without zero points, and each one's quantisation step."""
    from onnx import numpy_helper

    settings = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, bits, block = (settings[name] for name in ("N", "K", "bits", "block_size"))
    packed = numpy_helper.to_array(stored[node.input[1]]).reshape(rows, -1)
    if bits == 4:
        packed = np.stack((packed & 15, packed >> 4), axis=-1).reshape(rows, -1)
    scale = numpy_helper.to_array(stored[node.input[2]]).astype(np.float32).reshape(rows, -1)
    step = np.repeat(scale, block, axis=1)
    values = (packed.astype(np.float32) - np.float32(1 << (bits - 1))) * step
    return np.ascontiguousarray(values[:, :columns].T), np.abs(step[:, :columns].T)


def _dequantized_table(node: onnx.NodeProto, stored: dict[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows `[V,H]` of a `GatherBlockQuantized` of 8 bits around 128, and each value's quantisation step."""
    from onnx import numpy_helper

    codes, scales = (numpy_helper.to_array(stored[name]).astype(np.float32) for name in (node.input[0], node.input[2]))
    step = np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)
    return (codes - 128) * step, np.abs(step)


def _check_rounded(original: NDArray[Any], rounded: NDArray[Any], step: NDArray[Any], where: str) -> None:
    if original.shape != rounded.shape or not np.all(np.abs(original - rounded) <= step):
        apart = float(np.abs(original - rounded).max()) if original.shape == rounded.shape else rounded.shape
        raise SemkvError(
            "a weight of the target is not the model's weight rounded",
            where=where,
            expected=f"within one step of at most {float(step.max()):.2g}",
            got=apart,
            fix="build the bundle again",
        )


def _save(model: onnx.ModelProto, folder: Path, name: str) -> Path:
    path = folder / name
    save_with_data(model, path)
    return path

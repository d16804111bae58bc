"""Child process of test_rtx.py: build TensorRT-RTX engines with the plugins in them, on the CPU.

Run with the folder of an unversioned libtensorrt_rtx.so on LD_LIBRARY_PATH; without it parsing a plugin node aborts the
process. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import tensorrt_rtx_bindings as trt
from onnx import TensorProto, helper

from semkv_deploy import ops
from semkv_deploy.ops import nexus_attention

OVERLOADS = ("indexed", "mass", "int8", "fp8", "indexed_int8_mass", "indexed_fp8_mass")

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


class Logger(trt.ILogger):
    """Keeps warnings and errors."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.WARNING:
            self.lines.append(message)


def value(name: str, element: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def plugin_node(name: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        name, inputs, outputs, domain="semkv", plugin_namespace="semkv", plugin_version="1", **attributes
    )


def attention_model(dtype: str, layers: int, head_size: int = 64, capacity: int = 256) -> onnx.ModelProto:
    """`layers` NexusAttention nodes in a chain, dynamic batch and rows, static capacity, caches in and out."""
    t = TYPES[dtype]
    heads, kv_heads = 9, 3
    inputs = [
        value("query", t, ["batch", heads, "rows", head_size]),
        value("key", t, ["batch", kv_heads, "rows", head_size]),
        value("value", t, ["batch", kv_heads, "rows", head_size]),
        value("length", TensorProto.INT64, ["batch"]),
    ]
    outputs = [value("output", t, ["batch", heads, "rows", head_size])]
    nodes: list[onnx.NodeProto] = []
    query = "query"
    for i in range(layers):
        cache: list[int | str] = ["batch", kv_heads, capacity, head_size]
        inputs += [value(f"{n}.{i}", t, cache) for n in ("past.key", "past.value")]
        inputs.append(value(f"bias.{i}", TensorProto.FLOAT, ["batch", kv_heads, capacity]))
        outputs += [value(f"{n}.{i}", t, cache) for n in ("present.key", "present.value")]
        out = "output" if i == layers - 1 else f"hidden.{i}"
        nodes.append(
            plugin_node(
                "NexusAttention",
                [query, "key", "value", f"past.key.{i}", f"past.value.{i}", f"bias.{i}", "length"],
                [out, f"present.key.{i}", f"present.value.{i}"],
                causal=1,
                scale=0.125,
            )
        )
        query = out
    return finish(nodes, inputs, outputs)


def option_model(overload: str, with_body: bool = False) -> onnx.ModelProto:
    """One NexusAttention node with options, float16; with its body as a local function, too, where asked for."""
    sizes = {"B": 2, "Hq": 9, "Hkv": 3, "S": 1, "C": 256, "D": 64, "W": 64}
    elements = {
        "T": TensorProto.FLOAT16,
        "float32": TensorProto.FLOAT,
        "int64": TensorProto.INT64,
        "int8": TensorProto.INT8,
        "float8e4m3fn": TensorProto.FLOAT8E4M3FN,
    }
    spec = ops.SPECS["NexusAttention"].with_options(*overload.split("_"))
    inputs, outputs = (
        [value(t.name, elements[t.dtype], [sizes[d] for d in t.dims]) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    )
    node = plugin_node(spec.name, list(spec.input_names), list(spec.output_names), **spec.attributes)
    node.overload = spec.overload
    model = finish([node], inputs, outputs)
    if with_body:
        model.functions.append(nexus_attention.function_proto(*overload.split("_")))
    return model


def cluster_model(dtype: str) -> onnx.ModelProto:
    t, cache, bias = TYPES[dtype], [2, 3, 256, 64], [2, 3, 256]
    inputs = [value("kc", t, cache), value("vc", t, cache), value("sb", TensorProto.FLOAT, bias)]
    inputs += [value("length", TensorProto.INT64, [2]), value("chunk", TensorProto.INT64, [2, 1, 4, 256])]
    inputs += [value("thresholds", TensorProto.FLOAT, [4]), value("target", TensorProto.INT64, [2])]
    outputs = [value("ko", t, cache), value("vo", t, cache), value("bo", TensorProto.FLOAT, bias)]
    outputs += [value("lo", TensorProto.INT64, [2]), value("source", TensorProto.INT64, [2, 1, 256])]
    outputs.append(value("level", TensorProto.INT64, [2]))
    node = plugin_node("SemanticCluster", [v.name for v in inputs], [v.name for v in outputs], span=64)
    return finish([node], inputs, outputs)


def compact_model(dtype: str) -> onnx.ModelProto:
    t, cache, bias = TYPES[dtype], [2, 3, 256, 64], [2, 3, 256]
    inputs = [value("kc", t, cache), value("vc", t, cache), value("sb", TensorProto.FLOAT, bias)]
    inputs.append(value("keep", TensorProto.INT64, [2, 1, 256]))
    outputs = [value("ko", t, cache), value("vo", t, cache), value("bo", TensorProto.FLOAT, bias)]
    outputs.append(value("lo", TensorProto.INT64, [2]))
    node = plugin_node("CompactCache", [v.name for v in inputs], [v.name for v in outputs])
    return finish([node], inputs, outputs)


def block_map_model(dtype: str) -> onnx.ModelProto:
    t, blocks = TYPES[dtype], [2, "blocks"]
    inputs = [value("kc", t, [2, 3, 256, 64])]
    inputs += [value(n, TensorProto.INT64, blocks) for n in ("start", "length")]
    outputs = [value("r", t, [2, 3, "blocks", 2, 64]), value("slots", TensorProto.INT64, [2, "blocks", 40])]
    node = plugin_node(
        "SemanticBlockMap", [v.name for v in inputs], [v.name for v in outputs], vectors=2, max_block_length=40
    )
    return finish([node], inputs, outputs)


def block_select_model(dtype: str) -> onnx.ModelProto:
    t = TYPES[dtype]
    inputs = [value("q", t, [2, 9, 1, 64]), value("r", t, [2, 3, 32, 2, 64])]
    inputs += [value("slots", TensorProto.INT64, [2, 32, 40]), value("count", TensorProto.INT64, [2])]
    inputs.append(value("pinned", TensorProto.INT64, [2, 32]))
    outputs = [value("index", TensorProto.INT64, [2, 3, 256])]
    node = plugin_node(
        "SemanticBlockSelect", [v.name for v in inputs], [v.name for v in outputs], width=256, reduce_max=0
    )
    return finish([node], inputs, outputs)


def portable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its plugin nodes replaced by their operators' bodies in standard operators."""
    for node in without_plugin(model).graph.node:
        model.functions.extend(f for f in ops.function_protos() if f.name == node.op_type)
    return onnx.inliner.inline_local_functions(model)


def without_plugin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with nodes that name no plugin: the importer takes their local functions, overloads included."""
    for node in model.graph.node:
        attributes = [a for a in node.attribute if not a.name.startswith("plugin_")]
        del node.attribute[:]
        node.attribute.extend(attributes)
    return model


def finish(
    nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("semkv", 1)], ir_version=10
    )


def build(logger: Logger, model: onnx.ModelProto, library: str, embed: bool) -> dict[str, object]:
    logger.lines.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return {"parsed": False, "log": logger.lines[:]}
    layers = [str(network.get_layer(i).type).split(".")[-1] for i in range(network.num_layers)]
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    if embed:
        config.plugins_to_serialize = [library]
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shapes = [[low if d < 0 else d for d in tensor.shape] for low in (1, 2, 4)]
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return {
        "parsed": True,
        "layers": [name for name in layers if name == "PLUGIN_V3"],
        "bytes": 0 if plan is None else len(bytes(np.frombuffer(plan, dtype=np.uint8))),
        "log": logger.lines[:],
    }


def main() -> None:
    library = sys.argv[1]
    logger = Logger()
    registry = trt.get_plugin_registry()
    loaded = registry.load_library(library) is not None
    found = sorted(c.name for c in registry.all_creators if c.plugin_namespace == "semkv")
    results: dict[str, object] = {"loaded": loaded, "creators": found, "library_bytes": Path(library).stat().st_size}
    for dtype in TYPES:
        results[f"attention {dtype}"] = build(logger, attention_model(dtype, 1), library, False)
        results[f"cluster {dtype}"] = build(logger, cluster_model(dtype), library, False)
        results[f"compact {dtype}"] = build(logger, compact_model(dtype), library, False)
        results[f"block map {dtype}"] = build(logger, block_map_model(dtype), library, False)
        results[f"block select {dtype}"] = build(logger, block_select_model(dtype), library, False)
        for name, model in (("block map", block_map_model(dtype)), ("block select", block_select_model(dtype))):
            results[f"{name} body {dtype}"] = build(logger, portable(model), library, False)
    for overload in OVERLOADS:
        results[f"attention {overload}"] = build(logger, option_model(overload), library, False)
    for overload in ("indexed", "mass"):
        model = without_plugin(option_model(overload, True))
        results[f"attention {overload} body"] = build(logger, model, library, False)
    results["attention indexed, body beside it"] = build(logger, option_model("indexed", True), library, False)
    results["attention embedded"] = build(logger, attention_model("float16", 3), library, True)
    results["head size 72"] = build(logger, attention_model("float16", 1, head_size=72), library, False)
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()

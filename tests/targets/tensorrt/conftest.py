"""A decoder layer that TensorRT-RTX builds in well under a second, and a plugin library of one operator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnx.parser
import pytest
from onnx import helper

from semkv_deploy.targets.tensorrt.api import missing
from semkv_deploy.targets.tensorrt.request import EngineRequest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

PROMISED = [
    ("KV_CACHE_UPDATE", "layers.00.key_append"),
    ("KV_CACHE_UPDATE", "layers.00.value_append"),
    ("ATTENTION_INPUT", "layers.00.attention"),
]
ALIASES = {"past_key": "present_key", "past_value": "present_value"}
QUERY = {"query": ((1, 9, 1, 64), (1, 9, 8, 64), (1, 9, 16, 64))}
KEYS = dict.fromkeys(("key", "value"), ((1, 3, 1, 64), (1, 3, 8, 64), (1, 3, 16, 64)))


def decoder_layer(capacity: int | str = 256, attention: str = "", extra_input: str = "") -> onnx.ModelProto:
    """One folded decoder layer (G = 3, Hkv = 3, D = 64, float16), dynamic rows; `attention` are more inputs of it."""
    cache = f"float16[3,1,{capacity},64]"
    text = f"""<ir_version: 10, opset_import: ["": 24]>
    decoder (float16[1,9,rows,64] query, float16[1,3,rows,64] key, float16[1,3,rows,64] value,
             {cache} past_key, {cache} past_value, float[3,1,1,256] mask32,
             int64[3] length{extra_input})
        => (float16[1,9,rows,64] output, {cache} present_key, {cache} present_value) {{
        to_query = Constant<value = int64[4] {{-1, 3, 0, 64}}>()
        to_key = Constant<value = int64[4] {{-1, 1, 0, 64}}>()
        to_output = Constant<value = int64[4] {{-1, 9, 0, 64}}>()
        q = Reshape(query, to_query)
        k = Reshape(key, to_key)
        v = Reshape(value, to_key)
        present_key = TensorScatter<axis = -2, mode = "linear">(past_key, k, length)
        present_value = TensorScatter<axis = -2, mode = "linear">(past_value, v, length)
        mask = Cast<to = 10>(mask32)
        attended = Attention<scale = 0.125>(q, present_key, present_value, mask{attention})
        output = Reshape(attended, to_output)
    }}"""
    model = onnx.parser.parse_model(text)
    names = {"present_key": "key_append", "present_value": "value_append", "attended": "attention"}
    for number, node in enumerate(model.graph.node):
        part = names.get(node.output[0])
        node.name = f"layers.00.{part}" if part else f"other.{number}"
    return model


def plugin_layer(*, function: bool = False) -> onnx.ModelProto:
    """semkv::Append as a plugin node, with or without a local function of that name."""
    text = """<ir_version: 10, opset_import: ["": 24, "semkv": 1]>
    g (float[2,3,8,64] past_key, float[2,3,8,64] new) => (float[2,3,8,64] present_key) {
        present_key = semkv.Append(past_key, new)
    }"""
    if function:
        text += """<domain: "semkv", opset_import: ["": 24]> Append (past, new) => (present) {
            sum = Add(past, new)
            present = Neg(sum)
        }"""
    model = onnx.parser.parse_model(text)
    node = model.graph.node[0]
    node.name = "layers.00.attention"
    node.attribute.append(helper.make_attribute("plugin_namespace", "semkv"))
    node.attribute.append(helper.make_attribute("plugin_version", "1"))
    return model


def with_external_weights(model: onnx.ModelProto, path: Path) -> None:
    """Saves a model with the mask as a weight in `path` + ".data"."""
    import numpy as np
    from onnx import numpy_helper

    weight = numpy_helper.from_array(np.zeros((3, 1, 1, 256), np.float32), "mask32")
    model.graph.initializer.append(weight)
    model.graph.input.remove(next(value for value in model.graph.input if value.name == "mask32"))
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)


@pytest.fixture
def request_(tmp_path: Path) -> EngineRequest:
    """The decoder layer for three GPUs, proved. Skipped where TensorRT-RTX is not installed."""
    if gap := missing("tensorrt-rtx"):
        pytest.skip(gap)
    graph = tmp_path / "graph" / "decoder.0.5.onnx"
    graph.parent.mkdir()
    onnx.save(decoder_layer(), graph)
    return EngineRequest(
        runtime="tensorrt-rtx",
        onnx=graph,
        plan=tmp_path / "out" / "decoder.0.5.plan",
        profiles=[QUERY | KEYS],
        compute_capabilities=[86, 89, 120],
        promised=PROMISED,
        aliases=ALIASES,
    )


@pytest.fixture
def plugin_request(request_: EngineRequest) -> EngineRequest:
    """The plugin node, asked for as plugin, its library not given."""
    onnx.save(plugin_layer(), request_.onnx)
    return request_.model_copy(
        update={
            "profiles": [],
            "plugins": ["Append"],
            "promised": [("PLUGIN_V3", "layers.00.attention")],
            "aliases": {"past_key": "present_key"},
        }
    )


@pytest.fixture(scope="session")
def plugin_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled from append_plugin.cpp; skipped without a compiler or the TensorRT headers."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    script = [str(ROOT / "scripts" / "build_plugins.sh"), "--print-headers"]
    found = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    if found.returncode:
        pytest.skip(found.stderr.strip().splitlines()[-1])
    library = tmp_path_factory.mktemp("plugin") / "libappend.so"
    # The CUDA headers that TensorRT's include are the emulated ones, so that no CUDA toolkit is needed.
    includes = ["-isystem", found.stdout.strip(), "-isystem", str(ROOT / "plugins" / "emulation")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run(["g++", *flags, *includes, str(HERE / "append_plugin.cpp"), "-o", str(library)], check=True)
    return library

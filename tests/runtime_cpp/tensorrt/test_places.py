"""libsemkv calls TensorRT's functions by place in virtual tables: they are where NVIDIA's own callers find them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
COMPILER = os.environ.get("CXX", "c++")

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")


def compiled(source: str, out: Path, *options: str) -> Path:
    include = ["-I", str(ROOT / "plugins" / "runtime")]
    subprocess.run([COMPILER, "-std=c++17", "-w", *include, *options, str(HERE / source), "-o", str(out)], check=True)
    return out


@needs_compiler
def test_the_headers_of_tensorrt(tmp_path: Path):
    """Of the version that is found here; TENSORRT_ROOT names another."""
    script = [str(ROOT / "scripts" / "build_plugins.sh"), "--print-headers"]
    headers = subprocess.run(script, capture_output=True, text=True)
    if headers.returncode:
        pytest.skip(headers.stderr.strip())
    # The headers name CUDA's, of which two opaque types are enough.
    (tmp_path / "cuda_runtime_api.h").write_text(
        "#pragma once\ntypedef struct CUstream_st* cudaStream_t;\ntypedef struct CUevent_st* cudaEvent_t;\n"
    )
    program = compiled(
        "places.cpp", tmp_path / "places", "-isystem", headers.stdout.strip(), "-isystem", str(tmp_path), "-ldl"
    )
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) >= 10
    assert [line for line in lines if line.split()[1] != line.split()[2]] == []


CALLS = """
import ctypes, json, os, sys, types
fake = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
sys.modules["tensorrt_rtx_libs"] = types.ModuleType("tensorrt_rtx_libs")  # which would load the real library
ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt
places = []
def noted(call):
    result = call()
    places.append(fake.called())
    return result
runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
noted(lambda: setattr(runtime, "engine_host_code_allowed", True))
engine = noted(lambda: runtime.deserialize_cuda_engine(b"x" * 64))
noted(lambda: engine.num_io_tensors)
for call in (engine.get_tensor_name, engine.get_aliased_input_tensor):
    try:
        noted(lambda: call(0 if call == engine.get_tensor_name else "x"))
    except UnicodeDecodeError:  # the answer is no text, but the call was made
        places.append(fake.called())
context = noted(engine.create_execution_context)
noted(lambda: context.set_optimization_profile_async(0, 1))
noted(lambda: context.set_input_shape("x", (1, 2)))
noted(lambda: context.set_tensor_address("x", 16))
noted(lambda: context.execute_async_v3(1))
print(json.dumps([places, [fake.place(i) for i in range(10)]]), flush=True)
os._exit(0)  # destructors would meet objects that are none
"""


@needs_compiler
def test_the_calls_of_tensorrt_rtxs_python_module(tmp_path: Path):
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    if libraries is None or importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("TensorRT-RTX is not installed")
    name = "libtensorrt_rtx.so.1"
    fake = compiled("calls.cpp", tmp_path / name, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-ldl")
    parser = Path(str(libraries.origin)).parent / "libtensorrt_onnxparser_rtx.so.1"
    done = subprocess.run([sys.executable, "-c", CALLS, str(fake), str(parser)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    called, ours = json.loads(done.stdout)
    assert called == ours and -1 not in called

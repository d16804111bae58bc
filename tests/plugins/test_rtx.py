"""TensorRT-RTX engines with the plugins in them, built on the CPU. Skipped where the RTX wheels are not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.ops import SPECS

HERE = Path(__file__).parent
DTYPES = ("float32", "float16", "bfloat16")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed (PyPI: tensorrt-rtx-cu13-libs, tensorrt-rtx-cu13-bindings)",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The ONNX parser loads an unversioned libtensorrt_rtx.so, which the wheel lacks; without it the process aborts."""
    import tensorrt_rtx_libs

    folder = tmp_path_factory.mktemp("rtx")
    (folder / "libtensorrt_rtx.so").symlink_to(Path(tensorrt_rtx_libs.__file__).parent / "libtensorrt_rtx.so.1")
    return {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def child(environment: dict[str, str], code: list[str]) -> str:
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(environment: dict[str, str], cuda_build: Path) -> dict[str, Any]:
    library = str(cuda_build / "libsemkv_plugins.so")
    output = child(environment, [str(HERE / "rtx_build.py"), library])
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


def test_library_registers(results: dict[str, Any]) -> None:
    assert results["loaded"]
    assert results["creators"] == sorted(SPECS)


@pytest.mark.parametrize("operator", ["attention", "cluster", "compact", "block map", "block select"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_has_the_plugin(results: dict[str, Any], operator: str, dtype: str) -> None:
    built = results[f"{operator} {dtype}"]
    assert built["parsed"] and built["layers"] == ["PLUGIN_V3"], built["log"]
    assert built["bytes"] > 0, built["log"]


@pytest.mark.parametrize("operator", ["block map", "block select"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_without_the_plugin(results: dict[str, Any], operator: str, dtype: str) -> None:
    """The same operators from their bodies in standard operators: no custom library."""
    built = results[f"{operator} body {dtype}"]
    assert built["parsed"] and built["layers"] == [] and built["bytes"] > 0, built["log"]


@pytest.mark.parametrize("overload", ["indexed", "mass", "int8", "fp8", "indexed_int8_mass", "indexed_fp8_mass"])
def test_engine_has_the_plugin_with_options(results: dict[str, Any], overload: str) -> None:
    built = results[f"attention {overload}"]
    assert built["parsed"] and built["layers"] == ["PLUGIN_V3"], built["log"]
    assert built["bytes"] > 0, built["log"]


def test_the_plugin_wins_over_an_overloaded_function(results: dict[str, Any]) -> None:
    built = results["attention indexed, body beside it"]
    assert built["parsed"] and built["layers"] == ["PLUGIN_V3"] and built["bytes"] > 0, built["log"]


@pytest.mark.parametrize("overload", ["indexed", "mass"])
def test_an_overloaded_function_needs_no_plugin(results: dict[str, Any], overload: str) -> None:
    """Named slots, or the mass, in standard operators. Both together, and quantised caches, the importer refuses."""
    built = results[f"attention {overload} body"]
    assert built["parsed"] and built["layers"] == [] and built["bytes"] > 0, built["log"]


def test_library_is_embedded_in_the_plan(results: dict[str, Any]) -> None:
    built = results["attention embedded"]
    assert built["layers"] == ["PLUGIN_V3"] * 3
    assert built["bytes"] > results["library_bytes"] > results["attention float16"]["bytes"]


def test_unsupported_head_size_is_said_in_the_log(results: dict[str, Any]) -> None:
    refused = results["head size 72"]
    assert not refused["parsed"]
    line = "semkv::NexusAttention: input query dimension D: expected 64, 80, 96, 128 or 256, got 72"
    assert line in refused["log"]


def test_autoload_registers_once_and_a_second_copy_is_refused(
    environment: dict[str, str], cuda_build: Path, tmp_path: Path
) -> None:
    """What polygraphy --plugins does: dlopen before TensorRT is imported. Then a copy of the library is loaded too."""
    copy = tmp_path / "libsemkv_plugins_copy.so"
    copy.write_bytes((cuda_build / "libsemkv_plugins.so").read_bytes())
    script = f"""
import ctypes, sys
ctypes.CDLL({str(cuda_build / "libsemkv_autoload.so")!r})
sys.path.insert(0, {str(HERE)!r})
import rtx_build, tensorrt_rtx_bindings as trt
logger = rtx_build.Logger()
builder = trt.Builder(logger)
registry = trt.get_plugin_registry()
names = lambda: sorted(c.name for c in registry.all_creators if c.plugin_namespace == "semkv")
before = names()
second = registry.load_library({str(copy)!r})
print(before == names() == {sorted(SPECS)!r}, second)
print([line for line in logger.lines if "NexusAttention exists already" in line])
"""
    first, log = child(environment, ["-c", script]).splitlines()[:2]
    assert first == "True None"
    assert "loadLibrary" in log

"""What `tensorrt` and `tensorrt-rtx` differ in; everything else about the two targets is one code.

TensorRT-RTX builds without a GPU, for several compute capabilities in one plan. TensorRT builds for the GPU of the
machine. Nothing here imports either, except `runtime_module`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from semkv_deploy.choices import TensorRTTarget
from semkv_deploy.errors import SemkvError

Runtime = TensorRTTarget

MODULES: dict[Runtime, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx_bindings", "tensorrt_rtx"),
}
"""Python modules that are the runtime, first match; the wheels have the one, the SDK the other."""

TITLES: dict[Runtime, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

RTX_COMPUTE_CAPABILITIES = (75, 80, 86, 89, 120, 121)
"""What TensorRT-RTX 1.7 builds for: `trt.ComputeCapability`."""

RTX_DEFAULT_COMPUTE_CAPABILITIES = (80, 86, 89, 120)
"""What TensorRT-RTX builds for when nothing is asked: all from Ampere on, except for 121."""

_OPTION = "--compute-capability"
_SONAME_SHIM = ("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")


class Gpu(NamedTuple):
    """The first CUDA device: its name and compute capability, 86 for 8.6."""

    name: str
    compute_capability: int


def runtime_module(runtime: Runtime) -> ModuleType:
    """Imports the runtime: hundreds of MB of libraries, so only in the process that builds or runs with it.

    Raises:
        SemkvError: when it is not installed, or does not load.
    """
    name = _module_name(runtime)
    if name is None:
        raise SemkvError("is not installed", where=TITLES[runtime], fix=_install(runtime))
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise SemkvError(f"does not load: {error}", where=TITLES[runtime], fix=_install(runtime)) from None


def missing(runtime: Runtime) -> str | None:
    """What this machine lacks to build for a runtime (None: nothing), as an imperative clause."""
    if _module_name(runtime) is None:
        return f"install {TITLES[runtime]}: {_install(runtime)}"
    if runtime == "tensorrt-rtx":
        return None
    _, gap = find_gpu()
    return f"build on the machine with the GPU, or for tensorrt-rtx, which builds without: {gap}" if gap else None


def missing_to_run(runtime: Runtime) -> str | None:
    """What this machine lacks to run engines of a runtime (None: nothing), as an imperative clause."""
    if _module_name(runtime) is None:
        return f"install {TITLES[runtime]}: {_install(runtime)}"
    gpu, gap = find_gpu()
    if gpu is None:
        return f"run on a machine with an NVIDIA GPU: {gap}"
    if runtime == "tensorrt-rtx" and gpu.compute_capability not in RTX_COMPUTE_CAPABILITIES:
        return f"use target tensorrt: TensorRT-RTX does not know the {gpu.name} here (SM{gpu.compute_capability})"
    return None


def installed_version(runtime: Runtime) -> str | None:
    """Version of the installed runtime, e.g. "1.7.1.116", without importing it; None: not installed."""
    name = _module_name(runtime)
    if name is None:
        return None
    for distribution in importlib.metadata.packages_distributions().get(name, []):
        return importlib.metadata.version(distribution)
    return str(runtime_module(runtime).__version__)


@functools.cache
def find_gpu() -> tuple[Gpu | None, str | None]:
    """The GPU that CUDA would use, asked from the driver; else why there is none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None, "there is no NVIDIA driver here"
    code = driver.cuInit(0)
    if code:
        return None, f"the NVIDIA driver does not start (cuInit returned {code})"
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None, "the NVIDIA driver finds no GPU"
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    for attribute, value in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return Gpu(name.value.decode(), major.value * 10 + minor.value), None


def parse_compute_capabilities(text: str | None, runtime: Runtime) -> list[int]:
    """Compute capabilities to build for, 86 for 8.6, ascending and each once.

    Args:
        text: each as "86", "8.6", "sm_86" or "SM86", separated by commas; None: `default_compute_capabilities`.

    Raises:
        SemkvError: for what is no compute capability, or one that the runtime cannot build for on this machine.
    """
    if text is None:
        return default_compute_capabilities(runtime)
    wanted = sorted({_parse(word.strip()) for word in text.split(",")})
    check_compute_capabilities(wanted, runtime)
    return wanted


def default_compute_capabilities(runtime: Runtime) -> list[int]:
    """What is built for when nothing is asked: for `tensorrt` the GPU here, and nothing where there is none."""
    if runtime == "tensorrt-rtx":
        return list(RTX_DEFAULT_COMPUTE_CAPABILITIES)
    gpu, _ = find_gpu()
    return [gpu.compute_capability] if gpu else []


def check_compute_capabilities(wanted: Sequence[int], runtime: Runtime) -> None:
    """Fails for a compute capability that the runtime cannot build for on this machine.

    Raises:
        SemkvError: with what it can build for.
    """
    if runtime == "tensorrt-rtx":
        unknown = [capability for capability in wanted if capability not in RTX_COMPUTE_CAPABILITIES]
        if unknown:
            kind = {90: "Hopper", 100: "data centre Blackwell", 103: "data centre Blackwell"}.get(unknown[0])
            raise SemkvError(
                f"tensorrt-rtx builds for no {kind or 'such'} GPU",
                where=_OPTION,
                expected=" or ".join(map(str, RTX_COMPUTE_CAPABILITIES)),
                got=unknown[0],
                fix="use target tensorrt on the machine with that GPU",
            )
        return
    gpu, _ = find_gpu()
    others = [capability for capability in wanted if gpu is not None and capability != gpu.compute_capability]
    if gpu is not None and others:
        raise SemkvError(
            "tensorrt builds for the GPU in the machine only",
            where=_OPTION,
            expected=f"{gpu.compute_capability} ({gpu.name})",
            got=", ".join(map(str, others)),
            fix="build on a machine with that GPU, or use target tensorrt-rtx",
        )


@contextlib.contextmanager
def library_environment(runtime: Runtime) -> Iterator[dict[str, str]]:
    """Environment of a child process that uses the runtime.

    TensorRT-RTX's ONNX parser loads an unversioned libtensorrt_rtx.so when a plugin is asked for; the wheel has only
    libtensorrt_rtx.so.1, and without the other name the process aborts. The name is given in a temporary folder.
    """
    environment = dict(os.environ)
    folder = rtx_library_folder() if runtime == "tensorrt-rtx" else None
    if folder is None or os.name == "nt":
        yield environment
        return
    with tempfile.TemporaryDirectory(prefix="semkv-rtx-") as shim:
        os.symlink(folder / _SONAME_SHIM[1], Path(shim) / _SONAME_SHIM[0])
        paths = [shim, *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        yield environment | {"LD_LIBRARY_PATH": os.pathsep.join(paths)}


def rtx_library_folder() -> Path | None:
    """Folder of the wheel's libraries where it lacks the unversioned name, which `library_environment` then gives."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    given, present = (folder / name for name in _SONAME_SHIM)
    return folder if present.exists() and not given.exists() else None


def _module_name(runtime: Runtime) -> str | None:
    return next((name for name in MODULES[runtime] if importlib.util.find_spec(name) is not None), None)


def _install(runtime: Runtime) -> str:
    if runtime == "tensorrt":
        return "pip install 'semkv-deploy[gpu]' on a machine with an NVIDIA GPU"
    return "pip install 'semkv-deploy[rtx]'"


def _parse(word: str) -> int:
    match = re.fullmatch(r"(?:sm_?|compute_)?(\d{1,2}?)\.?(\d)", word.lower())
    if match is None:
        raise SemkvError(
            "not a compute capability", where=_OPTION, expected="86 or 8.6 or sm_86", got=word or "nothing"
        )
    return int(match[1] + match[2])

"""Native operators of ONNX Runtime: where their libraries are, and whether a bundle is built for them.

Libraries are this package's own, never a bundle's: `scripts/build_native.sh` puts them into the package's folder. One
is for the CPU provider; the other, over CUDA kernels, for the CUDA provider, and has fewer forms.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.choices import CacheType, Native

VERSION = 2
"""Of the library's operators, as graphs name them; the library says its own (`semkv_onnxruntime_version`), and has all
operators of those before."""

NATIVE_PROGRAMS = ("CompactCache", "SemanticBlockMap", "SemanticCluster")
"""Operators of programs beside the decoder that the library has."""

NATIVE_DECODER = ("SemanticBlockSelect",)
"""Operators of decoders beside NexusAttention that the library has."""

LIBRARY = Path(__file__).resolve().parents[2] / "native" / "libsemkv_onnxruntime.so"

CUDA_VERSION = 1
"""Of the operators of the library for CUDA; it says its own (`semkv_onnxruntime_cuda_version`)."""

CUDA_LIBRARY = LIBRARY.with_name("libsemkv_onnxruntime_cuda.so")

CUDA_HEAD_SIZES = (64, 80, 96, 128, 256)
"""That its NexusAttention has kernels for."""

_BUILD = "build it with scripts/build_native.sh"
_BUILD_CUDA = f"{_BUILD} cuda"


class NativeChoice(NamedTuple):
    """Whether a bundle's graphs have native operators, the type of its caches, and why.

    Attributes:
        version: of the library that they need; None: they have none.
        portable_forms: only forms that portable graphs have too, in place of `ops.native`'s.
    """

    on: bool
    cache_dtype: CacheType
    why: str
    version: int | None = None
    portable_forms: bool = False


@functools.lru_cache
def _load(path: str, changed: int) -> ctypes.CDLL:
    """The library; `changed`, when its file was, so that one that was built anew is loaded anew."""
    return ctypes.CDLL(path)


def _loaded(path: Path) -> ctypes.CDLL:
    return _load(str(path), path.stat().st_mtime_ns)


def _missing(path: Path, version: int, function: str, build: str) -> str | None:
    if not path.is_file():
        return f"no {path.name}: {build}"
    try:
        found = int(getattr(_loaded(path), function)())
    except (OSError, AttributeError) as error:
        return f"{path.name} does not load ({str(error).splitlines()[0]}): {build}"
    if found < version:
        return f"{path.name} is of version {found}, before {version}: {build}"
    return None


def missing(version: int = VERSION) -> str | None:
    """Why there is no library of a version, or a newer one, here, and how to get one; None: there is."""
    return _missing(LIBRARY, version, "semkv_onnxruntime_version", _BUILD)


def missing_cuda(version: int = CUDA_VERSION) -> str | None:
    """`missing`, of the library for CUDA."""
    return _missing(CUDA_LIBRARY, version, "semkv_onnxruntime_cuda_version", _BUILD_CUDA)


def simd() -> str:
    """The instruction set that the library's kernels run on here."""
    function = _loaded(LIBRARY).semkv_onnxruntime_simd
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _required(path: Path, lacking: str | None, version: int, target: str, fix: str) -> Path:
    if lacking is not None:
        raise SemkvError(
            "the bundle's graphs have native operators",
            where=f"target {target}",
            expected=f"{path.name} of version {version}",
            got=lacking.split(":")[0],
            fix=fix,
        )
    return path


def required_library(version: int) -> Path:
    """The library that graphs of a bundle need.

    Raises:
        SemkvError: when there is none of this version.
    """
    fix = f"{_BUILD}, or build the bundle with --native off"
    return _required(LIBRARY, missing(version), version, "onnxruntime-cpu", fix)


def required_cuda_library(version: int) -> Path:
    """`required_library`, on CUDA."""
    return _required(CUDA_LIBRARY, missing_cuda(version), version, "onnxruntime-cuda", _BUILD_CUDA)


def choose_native_cuda(native: Native, cache_dtype: CacheType) -> NativeChoice:
    """What `--native` and `--cache-dtype` come to for onnxruntime-cuda: a build needs no library.

    Raises:
        SemkvError: for "off", or for caches that the graphs cannot have.
    """
    if native == "off":
        raise SemkvError(
            "attention in place on CUDA takes the native operators",
            where="--target onnxruntime-cuda --native off",
            expected="auto or on",
            fix="leave --native out, or build for onnxruntime-cpu",
        )
    if cache_dtype != "float32":
        raise SemkvError(
            "graphs of onnxruntime-cuda have no such caches yet",
            where=f"--target onnxruntime-cuda --cache-dtype {cache_dtype}",
            expected="float32",
            fix="leave --cache-dtype out, or build for onnxruntime-cpu",
        )
    here = "is here" if missing_cuda() is None else "is not here: the bundle was built without it"
    return NativeChoice(True, cache_dtype, f"{CUDA_LIBRARY.name} {CUDA_VERSION} {here}", CUDA_VERSION, True)


def choose_native(native: Native, cache_dtype: CacheType) -> NativeChoice:
    """What `--native` and `--cache-dtype` come to on this machine.

    Raises:
        SemkvError: for "on" without the library, or for caches that only native operators have without them.
    """
    lacking = "--native off" if native == "off" else missing()
    if native == "on" and lacking is not None:
        raise SemkvError(
            "native operators are not available", where="--native on", got=lacking.split(":")[0], fix=_BUILD
        )
    if lacking is None:
        return NativeChoice(True, cache_dtype, f"{LIBRARY.name} {VERSION} is here ({simd()})", VERSION)
    if cache_dtype != "float32":
        raise SemkvError(
            "only native operators take such caches",
            where=f"--cache-dtype {cache_dtype}",
            expected="float32, or native operators",
            got=lacking.split(":")[0],
            fix="use --native auto" if native == "off" else _BUILD,
        )
    return NativeChoice(False, cache_dtype, lacking)


def choices_of(targets: Sequence[str], native: Native, cache_dtype: CacheType) -> dict[str, NativeChoice]:
    """By target of ONNX Runtime, what `--native` and `--cache-dtype` come to.

    Raises:
        SemkvError: as `choose_native` and `choose_native_cuda`.
    """
    choose = {"onnxruntime-cpu": choose_native, "onnxruntime-cuda": choose_native_cuda}
    return {target: choose[target](native, cache_dtype) for target in targets}

"""Native operators of ONNX Runtime's CPU provider: where their library is, and whether a bundle is built for them.

The library is this package's own, never a bundle's: `scripts/build_native.sh` puts it into the package's folder.
"""

from __future__ import annotations

import ctypes
import functools
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

_BUILD = "build it with scripts/build_native.sh"


class NativeChoice(NamedTuple):
    """Whether a bundle's decoder has native operators, the type of its caches, and why."""

    on: bool
    cache_dtype: CacheType
    why: str


@functools.lru_cache
def _load(path: str, changed: int) -> ctypes.CDLL:
    """The library; `changed`, when its file was, so that one that was built anew is loaded anew."""
    return ctypes.CDLL(path)


def _loaded() -> ctypes.CDLL:
    return _load(str(LIBRARY), LIBRARY.stat().st_mtime_ns)


def missing(version: int = VERSION) -> str | None:
    """Why there is no library of a version, or a newer one, here, and how to get one; None: there is."""
    if not LIBRARY.is_file():
        return f"no {LIBRARY.name}: {_BUILD}"
    try:
        library = _loaded()
        found = int(library.semkv_onnxruntime_version())
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} does not load ({str(error).splitlines()[0]}): {_BUILD}"
    if found < version:
        return f"{LIBRARY.name} is of version {found}, before {version}: {_BUILD}"
    return None


def simd() -> str:
    """The instruction set that the library's kernels run on here."""
    function = _loaded().semkv_onnxruntime_simd
    function.restype = ctypes.c_char_p
    return str(function().decode())


def required_library(version: int) -> Path:
    """The library that graphs of a bundle need.

    Raises:
        SemkvError: when there is none of this version.
    """
    lacking = missing(version)
    if lacking is not None:
        raise SemkvError(
            "the bundle's graphs have native operators",
            where="target onnxruntime-cpu",
            expected=f"{LIBRARY.name} of version {version}",
            got=lacking.split(":")[0],
            fix=f"{_BUILD}, or build the bundle with --native off",
        )
    return LIBRARY


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
        return NativeChoice(True, cache_dtype, f"{LIBRARY.name} {VERSION} is here ({simd()})")
    if cache_dtype != "float32":
        raise SemkvError(
            "only native operators take such caches",
            where=f"--cache-dtype {cache_dtype}",
            expected="float32, or native operators",
            got=lacking.split(":")[0],
            fix="use --native auto" if native == "off" else _BUILD,
        )
    return NativeChoice(False, cache_dtype, lacking)

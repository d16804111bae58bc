"""What libsemkv_onnxruntime_cuda.so is as a file, as nvcc builds it. Nothing here runs a kernel."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from tests.native.attention_cases import Case, inputs_of
from tests.native.runner import native_attention
from tests.native.test_library import lines


def test_it_shows_its_own_functions_only(cuda_library: Path) -> None:
    names = {line.split()[-1] for line in lines("nm", "-D", "--defined-only", str(cuda_library))}
    assert names == {"RegisterCustomOps", "semkv_onnxruntime_cuda_provider", "semkv_onnxruntime_cuda_version"}


def test_it_needs_no_cuda_to_be_loaded(cuda_library: Path) -> None:
    """CUDA's runtime is in it; the driver is looked for when a kernel is launched."""
    needed = [line.split("[")[1].rstrip("]") for line in lines("readelf", "-d", str(cuda_library)) if "NEEDED" in line]
    allowed = ("libc.so", "libm.so", "ld-linux", "libpthread.so", "libdl.so", "librt.so")
    assert needed and all(name.startswith(allowed) for name in needed), needed


def test_it_says_what_it_is(cuda_library: Path) -> None:
    library = ctypes.CDLL(str(cuda_library))
    library.semkv_onnxruntime_cuda_provider.restype = ctypes.c_char_p
    assert library.semkv_onnxruntime_cuda_version() == 1
    assert library.semkv_onnxruntime_cuda_provider() == b"CUDAExecutionProvider"


def test_no_other_provider_runs_its_nodes(cuda_library: Path) -> None:
    """ONNX Runtime has the operator's types, and refuses the session: nothing is run elsewhere without a word."""
    with pytest.raises(Exception, match=r"NexusAttention"):
        native_attention(cuda_library, inputs_of(Case((4,), dtype=torch.float32)))

"""libsemkv_onnxruntime_cuda.so: emulated, with the kernels of tests/plugins; and as nvcc builds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.conftest import cuda_build, emulated_kernels

__all__ = ["cuda_build", "emulated_kernels"]


@pytest.fixture(scope="session")
def emulated_library(emulated_kernels: Path) -> Path:
    return emulated_kernels.parent / "libsemkv_onnxruntime_cuda.so"


@pytest.fixture(scope="session")
def cuda_library(cuda_build: Path) -> Path:
    """For sm_80 and sm_90; skips where there is no nvcc."""
    return cuda_build / "libsemkv_onnxruntime_cuda.so"

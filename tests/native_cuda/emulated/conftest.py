"""Tests on the emulated kernels, which run in a process under the address sanitizer: `test_emulated.py` starts it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CUDA, CPU, BUNDLES = "SEMKV_TEST_CUDA_LIBRARY", "SEMKV_TEST_CPU_LIBRARY", "SEMKV_TEST_CUDA_BUNDLES"
"""Variables with the paths of both libraries and of a folder of bundles: nothing is built in that process."""

if CUDA not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The operators over the CUDA kernels, emulated: for the CPU provider."""
    return Path(os.environ[CUDA])


@pytest.fixture(scope="session")
def native_library() -> Path:
    """The operators that are made for a CPU."""
    return Path(os.environ[CPU])


@pytest.fixture(scope="session")
def bundles() -> Path:
    """A folder of bundles for onnxruntime-cuda and onnxruntime-cpu, by method."""
    return Path(os.environ[BUNDLES])


@pytest.fixture
def emulated_device(monkeypatch: pytest.MonkeyPatch, cuda_library: Path, native_library: Path) -> None:
    """onnxruntime-cuda runs here, as on a GPU but for the names of provider and device; both libraries are found."""
    from semkv_deploy.targets import TO_RUN
    from semkv_deploy.targets.onnxruntime import native, place

    device = place.CUDA._replace(provider="CPUExecutionProvider", options={}, device=("cpu", 0))
    monkeypatch.setitem(place.PLACES, place.CUDA.target, device)
    monkeypatch.setitem(TO_RUN, place.CUDA.target, lambda: None)
    monkeypatch.setattr(native, "CUDA_LIBRARY", cuda_library)
    monkeypatch.setattr(native, "LIBRARY", native_library)

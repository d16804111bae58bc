"""libsemkv_onnxruntime_cuda.so: emulated, with the kernels of tests/plugins; and as nvcc builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.methods import DynSplitSelect, Importance, Method, SemantiCache
from tests.plugins.conftest import cuda_build, emulated_kernels
from tests.tiny import tiny_checkpoint_at, tiny_export_at

__all__ = ["cuda_build", "emulated_kernels"]


@pytest.fixture(scope="session")
def emulated_library(emulated_kernels: Path) -> Path:
    return emulated_kernels.parent / "libsemkv_onnxruntime_cuda.so"


METHODS: dict[str, tuple[Method, float, str]] = {
    "semanticache": (SemantiCache(), 0.5, "fp32"),
    "importance": (Importance(), 0.5, "int4"),
    "select": (DynSplitSelect(attend=64), 1.0, "fp32"),
}
"""Method, budget and weights of the bundles, by name."""


@pytest.fixture(scope="session")
def export_of_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 64, which the kernels take."""
    folder = tmp_path_factory.mktemp("export64")
    return tiny_export_at(tiny_checkpoint_at(folder / "checkpoint", 64), folder / "tiny")


@pytest.fixture(scope="session")
def cuda_bundles(export_of_64: Path, native_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles for onnxruntime-cuda, and for onnxruntime-cpu with its native operators."""
    from semkv_deploy.targets.onnxruntime import native

    folder = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", native_library)
        for name, (method, budget, weights) in METHODS.items():
            options: dict[str, Any] = {"budgets": [budget], "weights": weights, "method": method, "max_context": 256}
            targets = ["onnxruntime-cuda", "onnxruntime-cpu"]
            build_bundle(export_of_64 / "decoder.onnx", folder / name, target=targets, **options)
    return folder


@pytest.fixture(scope="session")
def cuda_library(cuda_build: Path) -> Path:
    """For sm_80 and sm_90; skips where there is no nvcc."""
    return cuda_build / "libsemkv_onnxruntime_cuda.so"

"""A tiny bundle whose compressions both merge and evict, for ONNX Runtime and lowered for TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def both_targets(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Budget 0.25 of 512 tokens, float32, two rows; a low threshold merges, and what it leaves is evicted."""
    from semkv_deploy.build import build_bundle
    from semkv_deploy.methods import SemantiCache
    from semkv_deploy.targets.tensorrt_build import TensorRTOptions

    out = tmp_path_factory.mktemp("validate") / "bundle"
    build_bundle(
        str(tiny_export / "decoder.onnx"),
        out,
        budgets=[0.25],
        method=SemantiCache(ladder="paper", threshold=0.3),
        weights="fp32",
        target=["onnxruntime-cpu", "tensorrt-rtx"],
        tensorrt=TensorRTOptions(dtype="float32", batch=2, engines=False),
    )
    return out

"""Tiny bundles, graphs only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.methods import SemantiCache
from semkv_deploy.targets.tensorrt.build import TensorRTOptions


def build(export: Path, out: Path, **options: Any) -> Path:
    """Budget 0.25 unless `options` say otherwise; `tensorrt` holds the fields of its options."""
    options.setdefault("method", SemantiCache())
    options["tensorrt"] = TensorRTOptions(engines=False, **options.pop("tensorrt", {}))
    build_bundle(
        str(export / "decoder.onnx"), out, **{"budgets": [0.25], "weights": "fp32", "native": "off", **options}
    )
    return out


def merging(export: Path, out: Path, dtype: str, target: list[str]) -> Path:
    """Two rows whose compressions both merge and evict: a low threshold merges, and what it leaves is evicted."""
    method = SemantiCache(ladder="paper", threshold=0.3)
    return build(export, out, method=method, target=target, tensorrt={"dtype": dtype, "batch": 2})

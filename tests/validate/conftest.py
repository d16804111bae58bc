"""Tiny bundles to validate and to break, for ONNX Runtime and lowered for TensorRT."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bundles import merging


@pytest.fixture(scope="session")
def both_targets(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX Runtime in float32, and TensorRT as it ships: float16, with fused attention."""
    out = tmp_path_factory.mktemp("validate") / "bundle"
    return merging(tiny_export, out, "float16", ["onnxruntime-cpu", "tensorrt-rtx"])


@pytest.fixture(scope="session")
def decomposed(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TensorRT in float32, where attention over several rows has no fused kernel and is two products."""
    return merging(tiny_export, tmp_path_factory.mktemp("validate") / "float32", "float32", ["tensorrt-rtx"])


@pytest.fixture(scope="session")
def windowed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral whose two layers see 24 tokens, as `both_targets` otherwise."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from semkv_deploy.export import export_model
    from semkv_deploy.methods import SemantiCache

    folder = tmp_path_factory.mktemp("windowed")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=24,
        eos_token_id=1,
        bos_token_id=0,
        initializer_range=0.3,
    )
    MistralForCausalLM(config).save_pretrained(folder / "checkpoint")
    export_model(str(folder / "checkpoint"), folder / "export", SemantiCache())
    return merging(folder / "export", folder / "bundle", "float16", ["onnxruntime-cpu", "tensorrt-rtx"])

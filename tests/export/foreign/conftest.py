"""Decoders that torch.onnx writes of transformers' models: caches grown by Concat, attention in standard operators."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign_graphs import by_torch
from transformers import PreTrainedModel

from tests.tiny import tiny_tokenizer

from ..conftest import FAMILIES

TorchExported = Callable[..., Path]
GenaiExported = Callable[..., Path]


@pytest.fixture(scope="session")
def torch_exported(
    build_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> TorchExported:
    """`torch_exported(model_type, opset=20, positions=True, half=False, **config)`: when first asked for; with
    `Attention` from opset 23, and by TorchScript below 18."""

    @functools.cache
    def export(name: str, opset: int = 20, positions: bool = True, half: bool = False, **overrides: Any) -> Path:
        of_family = FAMILIES[name].config if name in FAMILIES else {}
        settings = {"vocab_size": 512, "num_hidden_layers": 1, **of_family, **overrides}
        model = build_model(name, **settings)
        if half:
            model = model.half()
        if opset >= 23:
            model.set_attn_implementation("sdpa")
        folder = tmp_path_factory.mktemp(name)
        return by_torch(model, tiny_tokenizer(), folder, opset, script=opset < 18, positions=positions)

    return export


@pytest.fixture(scope="session")
def genai_exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> GenaiExported:
    """`genai_exported(precision, provider="cpu")`: the tiny checkpoint by onnxruntime-genai's builder, when first asked
    for."""

    @functools.cache
    def export(precision: str, provider: str = "cpu") -> Path:
        out = tmp_path_factory.mktemp(f"genai-{precision}-{provider}")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(tiny_checkpoint), "-o", str(out)]
        command += ["-p", precision, "-e", provider, "-c", str(out / "cache")]
        subprocess.run(command, check=True, capture_output=True)
        return out

    return export

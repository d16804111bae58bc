"""Decoders that torch.onnx writes of transformers' models: caches grown by Concat, attention in standard operators."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from tests.tiny import tiny_tokenizer

from ..conftest import FAMILIES

TorchExported = Callable[..., Path]


class WithCache(torch.nn.Module):
    """A decoder whose cache goes in and out as tensors, keys and values of every layer in turn."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        out = self.model(**given, past_key_values=cache, use_cache=True)
        return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def export_by_torch(model: PreTrainedModel, folder: Path, opset: int = 20) -> Path:
    """Writes model.onnx, config.json and a tokenizer."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, rows, slots = 2, 3, 5
    past = [torch.zeros(batch, heads, slots, size) for _ in range(2 * config.num_hidden_layers)]
    names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    ids = torch.zeros(batch, rows, dtype=torch.long)
    mask, positions = torch.ones(batch, slots + rows, dtype=torch.long), torch.arange(slots, slots + rows).repeat(2, 1)
    free = torch.export.Dim.AUTO
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            WithCache(model),
            (ids, mask, positions, *past),
            dynamo=True,
            dynamic_shapes=(*[{0: free, 1: free}] * 3, tuple({0: free, 2: free} for _ in past)),
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    program.save(str(folder / "model.onnx"))
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder / "model.onnx"


@pytest.fixture(scope="session")
def torch_exported(
    build_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> TorchExported:
    """`torch_exported(model_type, opset=20, **config)`: when first asked for; with `Attention` from opset 23."""

    @functools.cache
    def export(name: str, opset: int = 20, **overrides: Any) -> Path:
        of_family = FAMILIES[name].config if name in FAMILIES else {}
        settings = {"vocab_size": 512, "num_hidden_layers": 1, **of_family, **overrides}
        model = build_model(name, **settings)
        if opset >= 23:
            model.set_attn_implementation("sdpa")
        return export_by_torch(model, tmp_path_factory.mktemp(name), opset)

    return export

"""Families through exporters: imported, built for both targets at two budgets, valid at both.

What stumbles is in one row each: windows, biases, partial rotary, learned positions (with OPT's offset), parallel
residuals, GPT-2's packed projections, norms of queries and keys. Llama is in `test_float16.py`, by both.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from foreign_graphs import by_genai
from transformers import PreTrainedModel

from semkv_deploy import validate_bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.methods import METHODS
from semkv_deploy.targets.tensorrt.build import TensorRTOptions
from tests.tiny import tiny_tokenizer

from .conftest import TorchExported


class Row(NamedTuple):
    """A configuration, and what of it the import must have found: rotary values of a head, window."""

    config: dict[str, Any]
    rotary: int | None
    window: int = 0


ALIKE = {"num_key_value_heads": 4}
"""For families that have no grouped heads, and whose configurations do not say so."""

BY_TORCH = {
    "qwen2": Row({}, 8),
    "qwen3": Row({"head_dim": 16}, 16),
    "mistral": Row({"sliding_window": 300}, 8, 300),
    "gemma": Row({"head_dim": 16}, 16),
    "phi": Row({"partial_rotary_factor": 0.5}, None),
    "gpt2": Row(ALIKE, None),
    "gpt_neox": Row(ALIKE, None),
    "opt": Row({**ALIKE, "ffn_dim": 48, "word_embed_proj_dim": 32}, None),
}
BY_GENAI = {
    "qwen2": Row({"hidden_size": 64}, 16),
    "qwen3": Row({"hidden_size": 64, "head_dim": 16}, 16),
    "mistral": Row({"hidden_size": 64}, 16),
    "gemma": Row({"head_dim": 16}, 16),
    # Its kernel wants a multiple of 8 columns in a table.
    "phi": Row({"hidden_size": 128, "partial_rotary_factor": 0.5}, 16),
}


def check(graph: Path, row: Row, place: Path, *, engines: bool = False) -> None:
    """Builds at budgets 0.3 and 1 for both targets, the import proved, and validates each beside portable graphs."""
    options: dict[str, Any] = {"weights": "fp32", "native": "off", "max_context": 512}
    tensorrt = TensorRTOptions(dtype="float32", engines=engines, compute_capabilities="86")
    bundle = build_bundle(
        graph,
        place / "bundle",
        method=METHODS["importance"](),
        budgets=[0.3, 1.0],
        target=["onnxruntime-cpu", "tensorrt-rtx"],
        tensorrt=tensorrt,
        **options,
    )
    facts = bundle.manifest.model
    assert (None if facts.rotary is None else facts.rotary.dim) == row.rotary
    assert set(facts.windows) == {row.window}
    report = validate_bundle(bundle.root, tokens=250)
    assert report.passed, [result for result in report.results if not result.passed]
    for target in ("onnxruntime-cpu", "tensorrt-rtx"):
        compared = [result for result in report.results if result.target == target and result.events]
        assert {result.budget for result in compared} == {0.3, 1.0}
        assert {result.budget: result.compressions > 0 for result in compared} == {0.3: True, 1.0: False}


@pytest.mark.parametrize("name", BY_TORCH)
def test_what_torch_writes_is_imported_built_and_valid(name: str, torch_exported: TorchExported, tmp_path: Path):
    row = BY_TORCH[name]
    engines = name == "gpt2" and importlib.util.find_spec("tensorrt_rtx_bindings") is not None
    check(torch_exported(name, max_position_embeddings=512, **row.config), row, tmp_path, engines=engines)


@pytest.mark.parametrize("name", BY_GENAI)
def test_what_genai_writes_is_imported_built_and_valid(
    name: str, build_model: Callable[..., PreTrainedModel], tmp_path: Path
):
    pytest.importorskip("onnxruntime_genai")
    row = BY_GENAI[name]
    sizes = {"vocab_size": 512, "num_hidden_layers": 1, "max_position_embeddings": 512}
    graph = by_genai(build_model(name, **{**sizes, **row.config}), tiny_tokenizer(), tmp_path / "genai", "fp32")
    check(graph, row, tmp_path)

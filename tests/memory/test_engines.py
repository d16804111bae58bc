"""The plan against TensorRT-RTX's own count of an engine's memory, over types, layouts, batches and heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.budget import budget_profile
from semkv_deploy.memory.estimate import make_plan
from semkv_deploy.methods import SemantiCache
from semkv_deploy.model.cache_groups import one_a_layer
from semkv_deploy.model.config import ModelFacts
from semkv_deploy.targets.build import TargetInputs
from semkv_deploy.targets.tensorrt.api import missing
from semkv_deploy.targets.tensorrt.build import TensorRTOptions, _lower
from semkv_deploy.targets.tensorrt.lower import write_weights

from .models import CONTEXT, LARGE, exported, near, worker

pytestmark = pytest.mark.skipif(missing("tensorrt-rtx") is not None, reason="TensorRT-RTX is not installed")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("llama", LARGE),
    "as many KV heads": ("llama", LARGE | {"num_key_value_heads": 8}),
    # No head_dim of its own: 8 heads of 80. Attention and MLP side by side.
    "phi": (
        "phi",
        {k: v for k, v in LARGE.items() if k != "head_dim"} | {"hidden_size": 640, "num_key_value_heads": 8},
    ),
}

CASES = [
    ("grouped", "float16", "dual", 4),
    ("grouped", "float16", "single", 4),
    ("grouped", "float16", "split", 4),
    ("grouped", "bfloat16", "dual", 1),
    ("grouped", "bfloat16", "single", 4),
    ("grouped", "float32", "dual", 1),
    ("grouped", "float32", "split", 1),
    ("as many KV heads", "float16", "dual", 4),
    ("as many KV heads", "float16", "single", 4),
    ("as many KV heads", "float32", "single", 4),
    ("phi", "float16", "dual", 1),
    ("phi", "bfloat16", "split", 1),
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Callable[[str], Path]:
    """`decoder(model)`: its export's decoder.onnx."""

    @functools.cache
    def make(model: str) -> Path:
        family, sizes = MODELS[model]
        folder = exported(tmp_path_factory.mktemp("plan"), tiny_checkpoint, family, **sizes)
        return folder / "export" / "decoder.onnx"

    return make


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, decoder: Any) -> Callable[[str, Any], tuple[bytes, Path]]:
    """`weights(model, dtype)`: the graph before it is lowered, and the folder of its weights."""

    @functools.cache
    def make(model: str, dtype: Any) -> tuple[bytes, Path]:
        folder = tmp_path_factory.mktemp("weights")
        return write_weights(decoder(model), folder, dtype)[0], folder

    return make


@pytest.mark.parametrize(("model", "dtype", "layout", "batch"), CASES)
def test_weights_and_activations(model: str, dtype: Any, layout: Any, batch: int, decoder: Any, weights: Any):
    source, method = decoder(model), SemantiCache()
    options = {"method": method, "max_context": CONTEXT, "target": "tensorrt-rtx", "dtype": dtype, "layout": layout}
    (planned,) = make_plan(str(source), budgets=[0.25], batches=[batch], **options).rows
    facts = ModelFacts.read(source.parent / "model.json")
    groups = one_a_layer(facts.layers, facts.kv_heads)
    profile = budget_profile(0.25, CONTEXT, bytes_per_slot=facts.cache_bytes_per_token, groups=groups)
    graph, folder = weights(model, dtype)
    asked = TensorRTOptions(dtype=dtype, layout=layout, batch=batch)
    inputs = TargetInputs(
        root=folder,
        model=facts,
        method=method.resolve(facts),
        max_context=CONTEXT,
        groups=groups,
        profiles=(profile,),
        settings=None,
        programs=(),
        stop_ids=(),
        progress=lambda what, share: None,
    )
    lowered = _lower(graph, folder, inputs, profile, asked, frozenset())
    said = [
        worker("builder", onnx=str(each.lowered.path), profiles=[profile.shapes for profile in each.profiles])
        for each in lowered
        if each.phase != "compressor"
    ]
    assert planned.weight_bytes == near(sum(each["weights"][0] for each in said))
    activations = [count for each in said for count in each["activations"]]
    if layout == "single":
        assert [planned.activation_bytes] == [near(count) for count in activations]
    else:
        assert [planned.activation_prefill_bytes, planned.activation_decode_bytes] == [near(c) for c in activations]

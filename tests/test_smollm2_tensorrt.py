"""SmolLM2-135M for TensorRT, at full depth: engines built and proved on the CPU, lowered graphs against PyTorch."""

from __future__ import annotations

import importlib.util
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.build import build_bundle
from semkv_deploy.bundle import Bundle, TensorRTRecord
from semkv_deploy.calibrate import calibration_text
from semkv_deploy.methods import SemantiCache
from semkv_deploy.runtime.session import Session
from semkv_deploy.runtime.tokens import delimiter_table, load_tokenizer
from semkv_deploy.targets.onnxruntime_engine import OnnxRuntimeEngine
from semkv_deploy.targets.tensorrt_build import TensorRTOptions
from semkv_deploy.validate.reference import ReferenceEngine


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed (extra `rtx`)"
)
def test_engines_at_full_depth(smollm2_export: Path, tmp_path: Path):
    """float16, budgets 0.2 and 0.5 of 8,192 tokens, one plan each for SM86, SM89 and SM120."""
    bundle = build_bundle(
        str(smollm2_export / "decoder.onnx"),
        tmp_path / "bundle",
        budgets=[0.2, 0.5],
        method=SemantiCache(),
        max_context=8192,
        target="tensorrt-rtx",
        tensorrt=TensorRTOptions(compute_capabilities="86,89,120"),
    )
    record = bundle.target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord) and record.compute_capabilities == [86, 89, 120]
    assert [budget.contract.capacity for budget in record.budgets] == [1664, 4096]
    engines = [engine for budget in record.budgets for engine in budget.engines]
    assert [engine.phase for engine in engines] == ["decoder", "compressor"] * 2
    for engine in engines:
        assert engine.plan is not None and (bundle.root / engine.plan).stat().st_size == engine.bytes
        # Both caches of 30 layers appended in place, 30 layers of attention, and nothing of either kind besides.
        promised = {"KV_CACHE_UPDATE": 60, "ATTENTION_INPUT": 30} if engine.phase == "decoder" else {}
        assert engine.layers == promised
    assert sum(engine.seconds for engine in engines) < 180
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    assert largest_child < 6 << 30


@pytest.fixture(scope="module")
def lowered(smollm2_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Half of 512 tokens in float32, graphs only."""
    return build_bundle(
        str(smollm2_export / "decoder.onnx"),
        tmp_path_factory.mktemp("smollm2") / "bundle",
        budgets=[0.5],
        method=SemantiCache(),
        max_context=512,
        target="tensorrt-rtx",
        tensorrt=TensorRTOptions(dtype="float32", engines=False),
    )


def session(bundle: Bundle, engine: Any) -> Session:
    import json

    manifest, profile = bundle.manifest, bundle.profile(0.5)
    ids = json.loads((bundle.root / "delimiters.json").read_text(encoding="utf-8"))["token_ids"]
    return Session(
        engine,
        windows=manifest.model.windows,
        method=manifest.method,
        profile=profile,
        max_context=manifest.max_context,
        is_delimiter=delimiter_table(ids, manifest.model.vocab_size),
        thresholds=profile.thresholds,
    )


def test_lowered_graphs_agree_with_pytorch_over_three_turns(lowered: Bundle, smollm2_model: Any):
    """Logits within 2e-3, the same greedy tokens, the same slots; the cache is compressed in between."""
    record, facts = lowered.target("tensorrt-rtx"), lowered.manifest.model
    assert isinstance(record, TensorRTRecord)
    decoder, compressor = (lowered.root / engine.onnx for engine in record.budgets[0].engines)
    capacity = record.budgets[0].contract.capacity
    ours = session(lowered, OnnxRuntimeEngine(decoder, compressor, facts=facts, batch=1, capacity=capacity))
    method = lowered.manifest.method
    reference = ReferenceEngine(smollm2_model, facts=facts, method=method, batch=1, capacity=capacity)
    theirs = session(lowered, reference)
    tokens = load_tokenizer(lowered.root).encode(calibration_text())
    for turn in range(3):
        prompt = tokens[turn * 130 : (turn + 1) * 130]
        logits, expected = ours.prefill(prompt), theirs.prefill(prompt)
        for _ in range(12):
            assert np.abs(logits - expected).max() <= 2e-3
            token = expected.argmax(-1)
            assert logits.argmax(-1) == token
            logits, expected = ours.step(token), theirs.step(token)
        np.testing.assert_array_equal(ours.length, theirs.length)
        np.testing.assert_array_equal(ours.slot_position, theirs.slot_position)
    assert ours.stats.runs == theirs.stats.runs >= 2
    assert ours.stats.levels == theirs.stats.levels and ours.stats.evicted == theirs.stats.evicted

"""SmolLM2-135M for TensorRT, at full depth: engines built and proved on the CPU, lowered graphs against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from semkv_deploy.bundle import Bundle, TensorRTRecord
from semkv_deploy.compiler.calibrate import calibration_text
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.methods import SemantiCache
from semkv_deploy.runtime.session import Session
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.targets.tensorrt.build import TensorRTOptions
from semkv_deploy.validate.checks import Graphs
from semkv_deploy.validate.reference import ReferenceEngine
from semkv_deploy.validate.weights import in_float32


def measured(arguments: list[str]) -> tuple[float, int]:
    """Seconds that a command takes, and most bytes of memory that it and its children have at a time."""
    started, most = time.monotonic(), 0
    child = psutil.Popen([sys.executable, "-m", "semkv_deploy.cli", *arguments])
    while child.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            most = max(most, sum(each.memory_info().rss for each in [child, *child.children(recursive=True)]))
        time.sleep(0.1)
    assert child.returncode == 0
    return time.monotonic() - started, most


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed (extra `rtx`)"
)
def test_engines_at_full_depth(smollm2_export: Path, tmp_path: Path):
    """float16, budgets 0.2 and 0.5 of 8,192 tokens, one plan each for SM86, SM89 and SM120."""
    command = ["build", str(smollm2_export / "decoder.onnx"), "--budget", "0.2", "--budget", "0.5"]
    command += [
        "--method",
        "semanticache",
        "--max-context",
        "8192",
        "--target",
        "tensorrt-rtx",
        "--compute-capability",
        "86,89,120",
    ]
    seconds, most = measured([*command, "-o", str(tmp_path / "bundle")])
    bundle = Bundle.open(tmp_path / "bundle")
    record = bundle.target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord) and record.compute_capabilities == [86, 89, 120]
    assert [budget.contract.capacity for budget in record.budgets] == [1664, 4096]
    engines = [engine for budget in record.budgets for engine in budget.engines]
    graphs = [graph for budget in record.budgets for graph in budget.contract.graphs]
    assert [graph.phase for graph in graphs] == ["decoder", "compressor"] * 2
    for engine, graph in zip(engines, graphs, strict=True):
        assert graph.plan is not None and (bundle.root / graph.plan).stat().st_size == engine.bytes
        # Both caches of 30 layers appended in place, 30 layers of attention, and nothing of either kind besides.
        promised = {"KV_CACHE_UPDATE": 60, "ATTENTION_INPUT": 30} if graph.phase == "decoder" else {}
        assert engine.layers == promised
    assert seconds <= 180
    assert 1 << 30 < most <= 6 << 30


@pytest.fixture(scope="module")
def lowered(smollm2_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Half of 256 tokens in float16, graphs only."""
    return build_bundle(
        str(smollm2_export / "decoder.onnx"),
        tmp_path_factory.mktemp("smollm2") / "bundle",
        budgets=[0.5],
        method=SemantiCache(),
        max_context=256,
        target="tensorrt-rtx",
        tensorrt=TensorRTOptions(engines=False),
    )


def test_lowered_graphs_agree_with_pytorch_over_three_turns(lowered: Bundle, smollm2_model: Any, tmp_path: Path):
    """The graphs TensorRT gets, computed in float32: logits and caches within 2e-3, the same greedy tokens and slots.

    The cache is compressed in between. PyTorch gets the same rounded weights; norms are float32 in both.
    """
    import torch

    built = lowered.built("tensorrt-rtx", 0.5)
    files = {graph.name: in_float32(lowered.root / graph.onnx, tmp_path) for graph in built.contract.graphs}
    graphs = Graphs(built, in_place=True).with_files(files, "float32")
    ours = Session(graphs.open(1))
    rounded = copy.deepcopy(smollm2_model)
    for parameter in rounded.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.float16).float()
    manifest = lowered.manifest
    reference = ReferenceEngine(graphs.opened, rounded, facts=manifest.model, method=manifest.method, batch=1)
    theirs = Session(reference)
    tokens = load_tokenizer(lowered.root).encode(calibration_text())
    for turn in range(3):
        prompt = tokens[turn * 70 : (turn + 1) * 70]
        logits, expected = ours.prefill(prompt), theirs.prefill(prompt)
        for _ in range(8):
            assert np.abs(logits - expected).max() <= 2e-3
            token = expected.argmax(-1)
            assert logits.argmax(-1) == token
            logits, expected = ours.step(token), theirs.step(token)
        np.testing.assert_array_equal(ours.length, theirs.length)
        for layer in range(len(ours.length)):
            np.testing.assert_array_equal(ours.slot_position[layer], theirs.slot_position[layer])
            live = int(ours.length[layer, 0])
            for name, limit in (("key", 2e-3), ("value", 2e-3), ("slot_bias", 1e-4)):
                got, wanted = (each.engine.read(name, layer)[:, :, :live] for each in (ours, theirs))
                assert got.shape == wanted.shape and np.abs(got - wanted).max() <= limit, f"layer {layer}"
    assert ours.stats.runs == theirs.stats.runs >= 3
    assert ours.stats.levels == theirs.stats.levels and ours.stats.evicted == theirs.stats.evicted

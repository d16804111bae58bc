"""A bundle of SmolLM2 whose operators are the plugins: in the decoder and the compressor, embedded in the plans."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest

from semkv_deploy.bundle import TensorRTRecord
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.methods import DynSplitSelect, SemantiCache, Sonic
from semkv_deploy.targets.tensorrt.build import TensorRTOptions
from tests.tiny import tiny_checkpoint_at, tiny_export_at, with_adapter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed (extra `rtx`)"
)


def test_smollm2_with_plugins(smollm2_export: Path, cuda_build: Path, tmp_path: Path) -> None:
    library = cuda_build / "libsemkv_plugins.so"
    options = TensorRTOptions(compute_capabilities="86", layout="split", plugins=("auto",), plugin_library=library)
    bundle = build_bundle(
        str(smollm2_export / "decoder.onnx"),
        tmp_path / "bundle",
        budgets=[0.2],
        method=SemantiCache(),
        max_context=2048,
        target="tensorrt-rtx",
        tensorrt=options,
    )
    record = bundle.target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord)
    assert record.plugins == ["CompactCache", "NexusAttention", "SemanticCluster"]
    assert record.plugin_library == library.name
    prefill, decode, compressor = record.budgets[0].engines
    # Prompts go through native fused attention, on the same caches.
    assert prefill.layers == {"ATTENTION_INPUT": 30, "KV_CACHE_UPDATE": 60}
    assert decode.layers == {"PLUGIN_V3": 30} and compressor.layers == {"PLUGIN_V3": 2}
    folded, plain, compress = record.budgets[0].contract.graphs
    for engine, graph in ((decode, plain), (compressor, compress)):
        assert graph.plan is not None and engine.bytes > library.stat().st_size
        assert library.read_bytes()[:4096] in (bundle.root / graph.plan).read_bytes()
        assert not onnx.load(bundle.root / graph.onnx, load_external_data=False).functions
    shapes = [{tensor.name: tensor.shape for tensor in graph.inputs} for graph in (folded, plain)]
    assert shapes[0]["past_key_values.00.key"] == (3, 1, 448, 64) and shapes[1]["past_key_values.00.key"] == (
        1,
        3,
        448,
        64,
    )
    assert folded.aliases == plain.aliases and len(plain.aliases) == 60


def test_selection_with_plugins(cuda_build: Path, tmp_path: Path) -> None:
    """Blocks are chosen, attended to and mapped by plugins; prompts have none. Head size 64, which the plugin has."""
    export = tiny_export_at(tiny_checkpoint_at(tmp_path / "checkpoint", head_dim=64), tmp_path / "export")
    options = TensorRTOptions(
        compute_capabilities="86", layout="split", plugins=("auto",), plugin_library=cuda_build / "libsemkv_plugins.so"
    )
    bundle = build_bundle(
        str(export / "decoder.onnx"),
        tmp_path / "bundle",
        budgets=[1.0],
        method=DynSplitSelect(attend=64),
        target="tensorrt-rtx",
        tensorrt=options,
    )
    record = bundle.target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord)
    assert record.plugins == ["NexusAttention", "SemanticBlockMap", "SemanticBlockSelect"]
    prefill, decode, blocks = (engine.layers for engine in record.budgets[0].engines)
    assert prefill == {"ATTENTION_INPUT": 2, "KV_CACHE_UPDATE": 4}
    assert decode == {"PLUGIN_V3": 4} and blocks == {"PLUGIN_V3": 1}


def test_nexus_turns_with_plugins(cuda_build: Path, tmp_path: Path) -> None:
    """SONIC's steps attend, and its turns are dropped, by plugins; prompts and Nexus rows take native attention."""
    export = tiny_export_at(tiny_checkpoint_at(tmp_path / "checkpoint", head_dim=64), tmp_path / "export")
    options = TensorRTOptions(
        compute_capabilities="86", layout="split", plugins=("auto",), plugin_library=cuda_build / "libsemkv_plugins.so"
    )
    bundle = build_bundle(
        str(export / "decoder.onnx"),
        tmp_path / "bundle",
        budgets=[0.5],
        method=with_adapter(Sonic(kept=0.2, placement="spread"), export),
        target="tensorrt-rtx",
        tensorrt=options,
    )
    record = bundle.target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord)
    assert record.plugins == ["CompactCache", "NexusAttention"]
    prefill, decode, drop = (engine.layers for engine in record.budgets[0].engines)
    assert prefill == {"ATTENTION_INPUT": 2, "KV_CACHE_UPDATE": 4}
    assert decode == {"PLUGIN_V3": 2} and drop == {"PLUGIN_V3": 1}

"""Selection of blocks on TensorRT: standard operators and plugins give the same, and the engines have the layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

from semkv_deploy.bundle import Bundle, TensorRTRecord
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.methods import DynSplit, DynSplitSelect
from semkv_deploy.targets.tensorrt import plugins as plugin_choice
from semkv_deploy.targets.tensorrt.api import missing
from semkv_deploy.targets.tensorrt.build import TensorRTOptions
from semkv_deploy.targets.tensorrt.plugins import OPERATORS
from semkv_deploy.validate.run import validate

RTX = pytest.mark.skipif(missing("tensorrt-rtx") is not None, reason="TensorRT-RTX is not installed")


def built(
    export: Path, out: Path, method: DynSplit | DynSplitSelect, *, budget: float = 1.0, **options: Any
) -> TensorRTRecord:
    build_bundle(
        str(export / "decoder.onnx"),
        out,
        budgets=[budget],
        method=method,
        target="tensorrt-rtx",
        tensorrt=TensorRTOptions(**{"layout": "split", "compute_capabilities": "86", **options}),
    )
    record = Bundle.open(out).target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord)
    return record


@RTX
@pytest.mark.parametrize("dtype, batch, representatives", [("float16", 2, "min_max"), ("bfloat16", 1, "mean_radius")])
def test_engines_append_in_place_and_attend_fused_to_what_is_gathered(
    dtype: Any, batch: int, representatives: Any, tiny_export: Path, tmp_path: Path
):
    method = DynSplitSelect(attend=64, representatives=representatives)
    record = built(tiny_export, tmp_path / "b", method, dtype=dtype, batch=batch)
    prefill, decode, blocks = record.budgets[0].engines
    assert prefill.layers == {"ATTENTION_INPUT": 2, "KV_CACHE_UPDATE": 4}
    assert decode.layers == {"ATTENTION_INPUT": 2, "KV_CACHE_UPDATE": 4, "TOPK": 2}
    assert all(engine.bytes for engine in (prefill, decode, blocks))
    assert validate(tmp_path / "b", tokens=250).passed


def test_graphs_read_chosen_rows_only(tiny_export: Path, tmp_path: Path):
    """Attention over W + 1 rows in steps, over the whole cache in prompts, which know nothing of blocks."""
    record = built(tiny_export, tmp_path / "b", DynSplitSelect(attend=48), engines=False, dtype="float16")
    graphs = {graph.phase: graph for graph in record.budgets[0].contract.graphs}
    shapes: dict[str, set[int]] = {}
    for phase in ("prefill", "decode"):
        model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "b" / graphs[phase].onnx))
        known = {
            value.name: value.type.tensor_type.shape.dim for value in (*model.graph.value_info, *model.graph.output)
        }
        attended = [node.input[1] for node in model.graph.node if node.op_type == "Attention"]
        shapes[phase] = {known[name][2].dim_value for name in attended}
    assert shapes == {"prefill": {512}, "decode": {49}}
    inputs = {phase: {tensor.name for tensor in graph.inputs} for phase, graph in graphs.items()}
    assert inputs["decode"] - inputs["prefill"] == {"block_end", "representatives.00", "representatives.01"}
    assert graphs["decode"].aliases == graphs["prefill"].aliases and len(graphs["decode"].aliases) == 4


@pytest.mark.parametrize(
    "asked",
    ["auto", "nexus_attention", "semantic_block_select,semantic_block_map", "nexus_attention,semantic_block_map"],
)
def test_any_of_its_operators_are_plugins(asked: str, tiny_export: Path, tmp_path: Path, monkeypatch: Any):
    """In the graph of steps and the program, with values of every attribute; bodies in their place give the same."""
    creators = [f"semkv::{name} 1" for name in OPERATORS]
    monkeypatch.setattr(plugin_choice, "_registered", lambda library, target: creators)
    (tmp_path / "lib.so").touch()
    options: dict[str, Any] = {"plugins": tuple(asked.split(",")), "plugin_library": tmp_path / "lib.so"}
    method = DynSplitSelect(attend=48, representatives="mean_radius")
    record = built(tiny_export, tmp_path / "b", method, engines=False, dtype="float32", **options)
    wanted = ["NexusAttention", "SemanticBlockMap", "SemanticBlockSelect"]
    names = asked.replace("_", "")
    expected = [name for name in wanted if asked == "auto" or name.lower() in names]
    assert record.plugins == expected
    prefill, decode, blocks = (
        onnx.load(tmp_path / "b" / graph.onnx, load_external_data=False) for graph in record.budgets[0].contract.graphs
    )
    found = Counter(node.op_type for graph in (prefill, decode, blocks) for node in graph.graph.node if node.domain)
    assert found == {name: 1 if name == "SemanticBlockMap" else 2 for name in expected}
    for node in decode.graph.node:
        if node.op_type == "NexusAttention":
            given = {attribute.name: attribute.i for attribute in node.attribute}
            assert given["indexed"] == 1 and not node.overload and len(node.input) == 8
    report = validate(tmp_path / "b", tokens=250)
    assert report.passed and any("bodies of" in result.detail for result in report.results)


@RTX
def test_engines_choose_of_what_an_evicted_cache_kept(tiny_export: Path, tmp_path: Path):
    """A table for each head: steps choose fused and in place as before, and two programs stand beside."""
    method = DynSplit(queries="predicted", blocks="delimiters", attend=48)
    record = built(tiny_export, tmp_path / "b", method, dtype="float16", batch=2, budget=0.25)
    prefill, decode, *programs = record.budgets[0].engines
    assert prefill.layers == {"ATTENTION_INPUT": 2, "KV_CACHE_UPDATE": 4}
    assert decode.layers == {"ATTENTION_INPUT": 2, "KV_CACHE_UPDATE": 4, "TOPK": 2}
    assert len(programs) == 2 and all(engine.bytes for engine in (prefill, decode, *programs))
    assert validate(tmp_path / "b", tokens=250).passed

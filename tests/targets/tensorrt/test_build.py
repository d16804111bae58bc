"""Bundles for TensorRT: graphs, contracts and engines that say the same; refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import onnx
import pytest

from semkv_deploy.bundle import Bundle, TensorRTRecord
from semkv_deploy.bundle.contract import Contract
from semkv_deploy.cli.bundle_summary import summary
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import DynSplit, Full, Importance, Method, SemantiCache, StreamingLLM
from semkv_deploy.model.cache_groups import by_layer, one_a_head
from semkv_deploy.targets.tensorrt.build import SCHEMA_FILE, TensorRTOptions

RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed (extra `rtx`)"
)


def build(export: Path, out: Path, method: Any = None, budgets: Any = (0.5,), **options: Any) -> TensorRTRecord:
    bundle = build_bundle(
        str(export / "decoder.onnx"),
        out,
        budgets=list(budgets),
        method=method or SemantiCache(),
        target="tensorrt-rtx",
        tensorrt=TensorRTOptions(**{"engines": False, **options}),
    )
    record = Bundle.open(out).target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord) and record == bundle.target("tensorrt-rtx")
    return record


@pytest.mark.parametrize("layout", ["dual", "single", "split"])
@pytest.mark.parametrize("batch", [1, 3])
def test_contract_is_what_the_graphs_say(tiny_export: Path, tmp_path: Path, layout: Any, batch: int):
    record = build(tiny_export, tmp_path / "b", layout=layout, batch=batch, budgets=(0.5, 1.0))
    assert [budget.contract.budget for budget in record.budgets] == [0.5, 1.0]
    for budget in record.budgets:
        contract = budget.contract
        phases = ["prefill", "decode"] if layout == "split" else ["decoder"]
        phases += ["compressor"] if contract.budget < 1 else []
        assert [graph.phase for graph in contract.graphs] == phases
        assert [engine.graph for engine in budget.engines] == [graph.name for graph in contract.graphs]
        assert contract.capacity == 512 * contract.budget
        for graph in contract.graphs:
            model = onnx.load(tmp_path / "b" / graph.onnx, load_external_data=False)
            assert not model.functions and all(node.domain == "" for node in model.graph.node)
            assert [tensor.name for tensor in graph.inputs] == [value.name for value in model.graph.input]
            assert [tensor.name for tensor in graph.outputs] == [value.name for value in model.graph.output]
            names = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
            for source, result in graph.aliases.items():
                assert names[source].shape == names[result].shape and names[source].dtype == names[result].dtype
                assert names[source].shape[1:] == (1, contract.capacity, 16)
            dynamic = {tensor.name for tensor in graph.inputs if any(isinstance(size, str) for size in tensor.shape)}
            runs = [profile.phase for profile in graph.profiles]
            if graph.phase in ("decode", "compressor"):
                assert not dynamic and not runs
                continue
            assert runs == {"dual": ["prefill", "decode"], "single": ["both"], "split": ["prefill"]}[layout]
            for profile in graph.profiles:
                assert set(profile.shapes) == dynamic
                low, best, high = profile.shapes["input_ids"]
                assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))
                if profile.phase == "decode":
                    assert (low, best, high) == ((1, 1), (batch, 1), (batch, 1))
                else:
                    assert high == (batch if profile.phase == "both" else 1, contract.prefill_chunk)
    assert (tmp_path / "b" / record.weights).stat().st_size == record.weight_bytes


def test_contract_of_a_budget(tiny_export: Path, tmp_path: Path):
    """2 layers, 4 heads over 2 KV heads of 16: folded."""
    record = build(tiny_export, tmp_path / "b")
    (budget,) = record.budgets
    contract = budget.contract
    room = contract.make_room
    assert room is not None and (contract.capacity, room.keep_slots, contract.prefill_chunk) == (256, (192, 192), 64)
    assert (room.by_group["sinks"], room.recent_share, room.levels) == ((4, 4), 0.5, 24)
    decoder, compressor = contract.graphs
    shapes = {tensor.name: tensor.shape for tensor in decoder.inputs}
    assert shapes["past_key_values.00.key"] == (2, 1, 256, 16) and decoder.has_input("slot_bias.01")
    assert decoder.aliases["past_key_values.01.value"] == "present.01.value" and len(decoder.aliases) == 4
    assert {tensor.name: tensor.dtype for tensor in decoder.inputs}["past_key_values.00.key"] == "float16"
    assert {tensor.name: tensor.shape for tensor in compressor.inputs}["key_cache"] == (1, 2, 256, 16)
    assert Contract.model_validate_json(contract.model_dump_json()) == contract
    schema = Contract.model_json_schema()
    assert set(schema["required"]) <= set(contract.model_dump())
    assert (tmp_path / "b" / "targets" / "tensorrt-rtx" / SCHEMA_FILE).is_file()


@pytest.mark.parametrize("method, compressor", [(StreamingLLM(), True), (Full(), False)], ids=["streaming-llm", "full"])
def test_methods_that_never_merge_have_no_biases(tiny_export: Path, tmp_path: Path, method: Any, compressor: bool):
    record = build(tiny_export, tmp_path / "b", method)
    contract = record.budgets[0].contract
    assert not contract.decoders[0].has_input("slot_bias.00") and "thresholds" not in str(contract.behaviours)
    assert [graph.phase for graph in contract.graphs] == ["decoder", "compressor"][: 1 + compressor]


@RTX
@pytest.mark.parametrize("layout, batch", [("dual", 1), ("single", 2), ("split", 2)])
def test_engines(tiny_export: Path, tmp_path: Path, layout: Any, batch: int):
    record = build(tiny_export, tmp_path / "b", layout=layout, batch=batch, engines=True, compute_capabilities="86,120")
    assert record.compute_capabilities == [86, 120] and record.version
    for engine, graph in zip(record.budgets[0].engines, record.budgets[0].contract.graphs, strict=True):
        assert graph.plan and (tmp_path / "b" / graph.plan).stat().st_size == engine.bytes > 0
        if graph.phase != "compressor":
            assert engine.layers == {"ATTENTION_INPUT": 2, "KV_CACHE_UPDATE": 4}


@RTX
@pytest.mark.parametrize("groups", ["by head", "by layer"])
def test_engines_of_cache_groups(groups: str, tiny_export: Path, tmp_path: Path):
    """A group is an alias pair and an attention of its own, whatever its capacity, and proved like a layer."""
    shares = one_a_head(2, 2) if groups == "by head" else by_layer([1.0, 3.0], 2)
    bundle = build_bundle(
        str(tiny_export / "decoder.onnx"),
        tmp_path / "b",
        budgets=[0.5],
        method=SemantiCache(),
        groups=shares,
        target="tensorrt-rtx",
        tensorrt=TensorRTOptions(compute_capabilities="86", batch=2),
    )
    record = bundle.target("tensorrt-rtx")
    decoder, *compressors = record.budgets[0].engines
    # One query head with several rows has no fused kernel: two heads of a group have none either.
    fused = {
        "KV_CACHE_UPDATE": 2 * len(shares),
        "MATRIX_MULTIPLY" if groups == "by head" else "ATTENTION_INPUT": len(shares),
    }
    assert decoder.layers == fused and len(compressors) == (1 if groups == "by head" else 2)


MERGES_AND_NOT = [
    Importance(queries="predicted", fit="none"),
    Importance(queries="predicted", fit="merge"),
    DynSplit(queries="predicted"),
]


@RTX
@pytest.mark.parametrize("method", MERGES_AND_NOT, ids=str)
def test_engines_of_selection_by_importance(method: Method, tiny_export: Path, tmp_path: Path):
    """Selection finds a threshold by its digits: nothing in it needs sorting, or a plugin."""
    record = build(tiny_export, tmp_path / "b", method, engines=True, compute_capabilities="86")
    decoder, compressor = record.budgets[0].engines
    assert decoder.layers == {"ATTENTION_INPUT": 2, "KV_CACHE_UPDATE": 4} and compressor.bytes > 0
    graph = onnx.load(tmp_path / "b" / record.budgets[0].contract.compressors[0].onnx)
    assert "TopK" not in {node.op_type for node in graph.graph.node}


@RTX
@pytest.mark.parametrize("dtype, attention", [("float32", "MATRIX_MULTIPLY"), ("bfloat16", "ATTENTION_INPUT")])
def test_other_types(tiny_export: Path, tmp_path: Path, dtype: Any, attention: str):
    """Several float32 rows have no fused kernel: attention is two products then."""
    record = build(tiny_export, tmp_path / "b", dtype=dtype, engines=True, compute_capabilities="86")
    assert record.budgets[0].engines[0].layers == {"KV_CACHE_UPDATE": 4, attention: 2}


def test_budgets_that_print_alike_have_files_of_their_own(tiny_export: Path, tmp_path: Path):
    record = build(tiny_export, tmp_path / "b", budgets=(0.30000001, 0.30000002, 1.0))
    names = [Path(graph.onnx).name for budget in record.budgets for graph in budget.contract.graphs]
    assert len(set(names)) == 5 and "decoder.0.30000002.onnx" in names and "decoder.1.onnx" in names


def shown(folder: Path, capsys: Any) -> str:
    capsys.readouterr()
    summary(Bundle.open(folder))
    return " ".join(capsys.readouterr().out.split())


def test_graphs_without_engines_are_promises_only(tiny_export: Path, tmp_path: Path, capsys: Any):
    build(tiny_export, tmp_path / "b")
    text = shown(tmp_path / "b", capsys)
    assert "┃ promised" in text and "┃ proved" not in text and "2 fused + 4 append" in text, text
    assert "built in" not in text


@RTX
def test_what_the_builder_says_is_recorded(tiny_export: Path, tmp_path: Path, capsys: Any):
    """Weights of its own in each plan, memory, kernel timings; an engine from the cache was built by nobody now."""
    options = {"engines": True, "compute_capabilities": "86", "engine_cache": tmp_path / "cache", "layout": "split"}
    record = build(tiny_export, tmp_path / "b", **options)
    prefill, decode, compressor = record.budgets[0].engines
    for engine in (prefill, decode, compressor):
        assert engine.peak_rss is not None and 100 << 20 < engine.peak_rss < 4 << 30
        assert engine.timing_cache == "not used: TensorRT-RTX times no kernels when it builds"
    for engine in (prefill, decode):
        assert engine.weight_bytes == pytest.approx(record.weight_bytes, rel=0.05) and not engine.warnings
        assert engine.bytes > engine.weight_bytes
    assert compressor.weight_bytes is not None and compressor.weight_bytes < 50_000
    assert all(not engine.warnings for engine in (prefill, decode, compressor))
    text = shown(tmp_path / "b", capsys)
    assert "┃ proved" in text and "┃ promised" not in text and "TensorRT warns" not in text
    assert "built in" in text and "GiB of memory at most; kernel timings not used: TensorRT-RTX times no" in text
    assert "MiB in the engines, each its own" in text
    again = build(tiny_export, tmp_path / "again", **options).budgets[0].engines
    assert [engine.weight_bytes for engine in again] == [each.weight_bytes for each in (prefill, decode, compressor)]
    assert [engine.peak_rss for engine in again] == [None] * 3
    assert "built in" not in shown(tmp_path / "again", capsys)
    bundle = Bundle.open(tmp_path / "b")
    warned = bundle.manifest.targets["tensorrt-rtx"].budgets[0].engines[0]
    warned.warnings += [f"note [{number}]" for number in range(5)]
    capsys.readouterr()
    summary(bundle)
    text = capsys.readouterr().out
    assert (
        "prefill.0.5: TensorRT warns: note [2]" in text
        and "note [3]" not in text
        and "prefill.0.5: 2 more warnings" in text
    )


@RTX
def test_engine_cache(tiny_export: Path, tmp_path: Path):
    options = {"engines": True, "compute_capabilities": "86", "engine_cache": tmp_path / "cache"}
    first = build(tiny_export, tmp_path / "first", **options)
    second = build(tiny_export, tmp_path / "second", **options)
    assert all(engine.seconds == 0 for engine in second.budgets[0].engines)
    assert [engine.layers for engine in first.budgets[0].engines] == [
        engine.layers for engine in second.budgets[0].engines
    ]


def refused(export: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(SemkvError) as error:
        build(export, tmp_path / "b", **{"engines": True, **options})
    assert not (tmp_path / "b").exists()
    return str(error.value)


@RTX
def test_refusals(tiny_export: Path, tmp_path: Path):
    text = refused(tiny_export, tmp_path, compute_capabilities="90")
    assert "--compute-capability" in text and "Hopper" in text and "use target tensorrt" in text.lower()
    text = refused(tiny_export, tmp_path, plugins=("nexus_attention",))
    assert text == (
        "--plugins nexus_attention: plugins were asked for without their library (expected --plugin-library "
        "libsemkv_plugins.so). "
        "Build it with scripts/build_plugins.sh, or use --plugins none."
    )
    text = refused(tiny_export, tmp_path, plugins=("nexus",), plugin_library=tiny_export / "decoder.onnx")
    assert (
        "--plugins: unknown plugin (expected none, auto, or of nexus_attention, semantic_block_select, semantic_cluster"
        in text
    )
    text = refused(tiny_export, tmp_path, plugin_library=tmp_path / "none.so")
    assert text.startswith("--plugin-library") and "no such file" in text


def test_missing_external_data(tiny_export: Path, tmp_path: Path):
    (tmp_path / "decoder.onnx").write_bytes((tiny_export / "decoder.onnx").read_bytes())
    for name in ("model.json", "delimiters.json"):
        (tmp_path / name).write_bytes((tiny_export / name).read_bytes())
    with pytest.raises(SemkvError, match="the weights are missing"):
        build(tmp_path, tmp_path / "b")


@RTX
def test_engine_of_another_version(tiny_export: Path, tmp_path: Path):
    """The plan's own header counts: inspecting says which version to install."""
    from click.testing import CliRunner

    from semkv_deploy.bundle import Manifest, write_manifest
    from semkv_deploy.cli import main

    record = build(tiny_export, tmp_path / "b", engines=True, compute_capabilities="86")
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "b")]).exit_code == 0
    plan = tmp_path / "b" / str(record.budgets[0].contract.graphs[0].plan)
    data = bytearray(plan.read_bytes())
    data[24:28] = bytes([1, 4, 0, 76])
    plan.write_bytes(data)
    write_manifest(tmp_path / "b", Manifest.model_validate_json((tmp_path / "b" / "bundle.json").read_text()))
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "b")])
    assert done.exit_code == 1
    assert "the engine needs the version of TensorRT-RTX that built it (expected 1.4.0.76, got " in done.output
    assert "install that version: pip install tensorrt-rtx-cu13-bindings==1.4.0.76" in done.output.lower()


@RTX
def test_real_engines_with_plugins_are_opened_by_the_callers_word_alone(tiny_export: Path, tmp_path: Path):
    """Without it nothing of the file is looked at; with it the machine is what refuses, where it has no GPU."""
    from semkv_deploy.targets import open_engine
    from semkv_deploy.targets.tensorrt.api import missing_to_run

    build(tiny_export, tmp_path / "b", engines=True, compute_capabilities="86")
    built = dataclasses.replace(Bundle.open(tmp_path / "b").built("tensorrt-rtx"), plugins=("NexusAttention",))
    with pytest.raises(SemkvError, match="native code"):
        open_engine(built)
    if missing_to_run("tensorrt-rtx") is not None:
        with pytest.raises(Exception, match=r"(?i)cuda|driver") as error:
            open_engine(dataclasses.replace(built, allow_plugins=True))
        assert "native code" not in str(error.value)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_8_bit_caches_have_no_native_path(dtype: str, tiny_export: Path, tmp_path: Path):
    from click.testing import CliRunner

    from semkv_deploy.cli import main

    source = str(tiny_export / "decoder.onnx")
    options = ["--budget", "0.5", "--target", "tensorrt-rtx", "--dtype", dtype, "-o", str(tmp_path / "b")]
    done = CliRunner().invoke(main, ["build", source, *options])
    assert done.exit_code == 1 and not (tmp_path / "b").exists()
    assert (
        f"--dtype: TensorRT's in-place append takes no 8-bit cache (expected float16, bfloat16 or float32, got {dtype})"
        in done.output
    )


def test_a_bundle_without_engines_does_not_run(tiny_export: Path, tmp_path: Path):
    from semkv_deploy.runtime.open import open_session

    build(tiny_export, tmp_path / "b")
    with pytest.raises(SemkvError, match=r"no engines were built\. Build the bundle without --no-engines"):
        open_session(Bundle.open(tmp_path / "b"), target="tensorrt-rtx")


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_commands_that_run_say_what_is_missing_here(tiny_export: Path, tmp_path: Path, command: str):
    from click.testing import CliRunner

    from semkv_deploy.cli import main
    from semkv_deploy.targets.tensorrt.api import missing_to_run

    if missing_to_run("tensorrt-rtx") is None:
        pytest.skip("engines run on this machine")
    build(tiny_export, tmp_path / "b")
    prompt = ["--prompt", "x"] if command == "generate" else []
    done = CliRunner().invoke(main, [command, str(tmp_path / "b"), "--target", "tensorrt-rtx", *prompt])
    assert done.exit_code == 1
    assert "--target tensorrt-rtx: does not run on this machine" in done.output

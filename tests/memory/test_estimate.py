"""The plan against what is built: a bundle's weights, a session's memory, and what TensorRT-RTX's builder counts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from semkv_deploy.bundle import Bundle, TensorRTRecord
from semkv_deploy.choices import CacheType
from semkv_deploy.cli import main
from semkv_deploy.errors import SemkvError
from semkv_deploy.memory.estimate import Plan, PlanRow, make_plan
from semkv_deploy.methods import SemantiCache, method_from_options
from semkv_deploy.targets.onnxruntime import native
from semkv_deploy.targets.tensorrt.api import missing

from .models import CONTEXT, LARGE, exported, near, session_memory, worker

RTX = pytest.mark.skipif(missing("tensorrt-rtx") is not None, reason="TensorRT-RTX is not installed")
MIB = 1 << 20


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Widths that blocks of 32 do not divide, and a head that is the embedding, or one of its own."""
    return exported(
        tmp_path_factory.mktemp("narrow"),
        tiny_checkpoint,
        vocab_size=2048,
        hidden_size=144,
        intermediate_size=400,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=request.param,
    )


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Large enough that what is not the model's own is below 5 %: 8 layers of 512, vocabulary 8,192."""
    folder = exported(
        tmp_path_factory.mktemp("plan"),
        tiny_checkpoint,
        **LARGE,
    )
    return folder / "export" / "decoder.onnx"


@pytest.fixture(scope="module")
def bundle(export: Path) -> Bundle:
    """Budgets 0.25 and 1 with float32 weights, and engines where TensorRT-RTX is installed."""
    from semkv_deploy.compiler.pipeline import build_bundle

    targets = ["onnxruntime-cpu", *(["tensorrt-rtx"] if missing("tensorrt-rtx") is None else [])]
    return build_bundle(
        str(export),
        export.parent.parent / "bundle",
        budgets=[0.25, 1.0],
        method=SemantiCache(),
        max_context=CONTEXT,
        weights="fp32",
        # Native operators, where they are installed, take less.
        native="off",
        target=targets,
        # Thresholds change no size.
        calibration_text="The sky is blue because air scatters short waves more than long ones. " * 20,
    )


@pytest.fixture(scope="module")
def narrow_bundle(export: Path, native_library: Path) -> Bundle:
    """Float16 caches, with native operators."""
    from semkv_deploy.compiler.pipeline import build_bundle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", native_library)
        return build_bundle(
            str(export),
            export.parent.parent / "narrow",
            budgets=[0.25, 1.0],
            method=SemantiCache(),
            max_context=CONTEXT,
            weights="fp32",
            cache_dtype="float16",
            calibration_text="The sky is blue because air scatters short waves more than long ones. " * 20,
        )


def plan(source: Path, **options: Any) -> Plan:
    narrow = options.get("cache_dtype", "float32") != "float32"
    native = "on" if narrow else "off"  # whatever this machine has
    given = {"budgets": [0.25, 1.0], "method": SemantiCache(), "max_context": CONTEXT, "native": native, **options}
    return make_plan(str(source), **given)


def row(source: Path, budget: float, **options: Any) -> PlanRow:
    return plan(source, budgets=[budget], **options).rows[0]


def test_onnxruntime_weights_are_those_of_the_bundle(export: Path, bundle: Bundle):
    assert row(export, 0.25, weights="fp32").weight_bytes == near(bundle.target("onnxruntime-cpu").weight_bytes)


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_every_weight_format_is_counted_as_the_quantiser_stores_it(narrow: Path, tmp_path: Path, weights: Any):
    from semkv_deploy.passes.quantize import quantize_weights
    from semkv_deploy.targets.onnxruntime.build import lower_decoder, save_decoder

    source = narrow / "export" / "decoder.onnx"
    built = save_decoder(lower_decoder(source, bias="group", groups=2), tmp_path / "fp32.onnx")
    if weights != "fp32":
        built = save_decoder(quantize_weights(tmp_path / "fp32.onnx", weights), tmp_path / "quantised.onnx")
    planned = row(source, 0.5, weights=weights).weight_bytes
    assert planned == pytest.approx(built.weight_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("budget", "batch", "tokens"), [(0.25, 1, 1500), (1.0, 1, 300), (0.25, 3, 1150), (1.0, 3, 150)]
)
def test_memory_of_a_session(export: Path, bundle: Bundle, budget: float, batch: int, tokens: int):
    """All that a session takes: the process's own memory, which counts nothing mapped from files.

    What the allocators keep beside the caches differs by a few MiB from run to run, 2 % of this model.
    """
    planned = row(export, budget, batches=[batch], weights="fp32")
    bytes_planned = max(planned.total_bytes, planned.load_bytes)
    measured = session_memory(bytes_planned, root=str(bundle.root), budget=budget, batch=batch, tokens=tokens)
    assert (measured["compressions"] > 0) == (budget < 1)
    assert planned.buffer_bytes == measured["buffer_bytes"]
    assert planned.metadata_bytes == measured["metadata_bytes"]
    assert bytes_planned == near(measured["peak_bytes"]), planned


@pytest.mark.parametrize(("budget", "batch", "tokens"), [(0.25, 3, 1150), (1.0, 3, 150)])
def test_memory_of_a_session_with_narrow_caches(
    export: Path, narrow_bundle: Bundle, native_library: Path, budget: float, batch: int, tokens: int
):
    planned = row(export, budget, batches=[batch], weights="fp32", cache_dtype="float16")
    asked = {"budget": budget, "batch": batch, "tokens": tokens, "library": str(native_library)}
    bytes_planned = max(planned.total_bytes, planned.load_bytes)
    measured = session_memory(bytes_planned, root=str(narrow_bundle.root), **asked)
    assert (measured["compressions"] > 0) == (budget < 1)
    assert planned.buffer_bytes == measured["buffer_bytes"]
    assert bytes_planned == near(measured["peak_bytes"]), planned


def test_types_of_caches_scale_them_and_say_what_they_need(export: Path):
    def of(dtype: CacheType, **options: Any) -> PlanRow:
        return row(export, 0.25, cache_dtype=dtype, **options)

    wide, half, eight = of("float32", native="on"), of("float16"), of("int8")
    assert wide.cache_bytes == 2 * half.cache_bytes and half.full_read_bytes_per_step == 4 * half.cache_bytes
    # A scale for each row of 64 numbers.
    assert eight.cache_bytes * 64 * 4 == wide.cache_bytes * 68
    assert wide.activation_bytes < row(export, 0.25, native="off").activation_bytes
    # Bytes mean those bytes: a quarter of the float32 cache is half of the float16 one.
    in_bytes = plan(export, budgets=[f"{wide.cache_bytes >> 20}MiB"], cache_dtype="float16").rows[0]
    assert in_bytes.capacity == 2 * wide.capacity
    assert plan(export, cache_dtype="int8").native and not plan(export, native="off").native
    with pytest.raises(SemkvError, match="only native operators take such caches"):
        of("int8", native="off")


@RTX
def test_engines_are_as_large_as_planned(export: Path, bundle: Bundle):
    record = bundle.target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord)
    for built in record.budgets:
        planned = row(export, built.contract.budget, target="tensorrt-rtx")
        on_disk = sum(engine.bytes for engine in built.engines)
        assert planned.weight_bytes + planned.program_bytes == near(on_disk)


@RTX
def test_builder_counts_the_same_weights_and_activations(export: Path, bundle: Bundle):
    record = bundle.target("tensorrt-rtx")
    assert isinstance(record, TensorRTRecord)
    built = record.budgets[0]
    planned = row(export, built.contract.budget, target="tensorrt-rtx")
    graph, compressor = built.contract.graphs
    assert [profile.phase for profile in graph.profiles] == ["prefill", "decode"]
    shapes = [profile.shapes for profile in graph.profiles]
    said = worker("builder", onnx=str(bundle.root / graph.onnx), profiles=shapes)
    assert planned.weight_bytes == near(said["weights"][0])
    assert planned.activation_prefill_bytes == near(said["activations"][0])
    assert planned.activation_decode_bytes == near(said["activations"][1])
    assert planned.compressor_bytes == near(
        worker("builder", onnx=str(bundle.root / compressor.onnx), profiles=[])["activations"][0]
    )


def test_dtype_and_layout_scale_tensorrt_weights(export: Path):
    half = row(export, 0.25, target="tensorrt", layout="single")
    full = row(export, 0.25, target="tensorrt", layout="single", dtype="float32")
    split = row(export, 0.25, target="tensorrt", layout="split")
    assert full.weight_bytes == pytest.approx(2 * half.weight_bytes, rel=0.01)
    assert full.cache_bytes == 2 * half.cache_bytes and full.bias_bytes == half.bias_bytes
    assert split.weight_bytes == 2 * half.weight_bytes
    assert split.activation_bytes == split.activation_decode_bytes + split.activation_prefill_bytes


def test_total_is_the_sum_of_its_parts_and_rows_are_budgets_by_batches(export: Path):
    for target in ("onnxruntime-cpu", "tensorrt-rtx"):
        found = plan(export, target=target, batches=[4, 1])
        assert [(each.budget, each.batch) for each in found.rows] == [(0.25, 1), (0.25, 4), (1, 1), (1, 4)]
        for each in found.rows:
            parts = (
                "weight",
                "packing",
                "program",
                "cache",
                "bias",
                "spare",
                "activation",
                "compressor",
                "metadata",
                "io",
            )
            assert each.total_bytes == sum(getattr(each, f"{part}_bytes") for part in parts)
        quarter, full = found.rows[1], found.rows[3]
        assert quarter.full_total_bytes == full.full_total_bytes == full.total_bytes
        assert quarter.read_bytes_per_step == quarter.cache_bytes == full.cache_bytes / 4
        assert (quarter.cache_ratio, full.cache_ratio) == (4, 1)
        assert full.spare_bytes == full.compressor_bytes == 0


def test_methods_differ_in_what_they_need_beside_the_cache(export: Path):
    merging = row(export, 0.25)
    evicting = row(export, 0.25, method=method_from_options("streaming-llm", {}))
    by_head = row(export, 0.25, method=method_from_options("semanticache", {"cluster_by": "head"}))
    assert evicting.cache_bytes == merging.cache_bytes == by_head.cache_bytes
    assert evicting.compressor_bytes < merging.compressor_bytes < by_head.compressor_bytes
    assert by_head.metadata_bytes == 2 * merging.metadata_bytes


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "tensorrt-rtx"])
def test_largest_context_and_budget_are_the_largest_that_fit(export: Path, target: str):
    memory = int(1.2 * row(export, 0.25, target=target, max_context=1024, batches=[2]).total_bytes)
    found = row(export, 0.25, target=target, memory=memory, batches=[2])
    assert found.fits == (max(found.total_bytes, found.load_bytes) <= memory)
    context = found.largest_context
    assert context is not None and 512 <= context < CONTEXT
    fitting = row(export, 0.25, target=target, max_context=context, batches=[2])
    assert (
        fitting.total_bytes
        <= memory
        < row(export, 0.25, target=target, max_context=context + 1, batches=[2]).total_bytes
    )
    # The full cache needs no compressor, and so may fit where a large budget does not.
    budget = found.largest_budget
    assert budget is not None and 0 < budget <= 1
    assert row(export, budget, target=target, batches=[2]).total_bytes <= memory
    larger = [round(budget + step / 100, 2) for step in range(1, round(100 * (1 - budget)) + 1, 7)]
    assert all(row(export, each, target=target, batches=[2]).total_bytes > memory for each in larger)


def test_ample_memory_fits_all_the_model_was_made_for(export: Path):
    found = row(export, 0.25, max_context=1024, memory=1 << 40)
    assert (found.fits, found.largest_context, found.largest_budget) == (True, CONTEXT, 1)


def test_reads_no_weights_and_is_quick(export: Path, tmp_path: Path):
    """Weights of zeros (a file without a single block) give the same plan."""
    for name in ("decoder.onnx", "model.json"):
        (tmp_path / name).write_bytes((export.parent / name).read_bytes())
    with (tmp_path / "decoder.onnx.data").open("wb") as file:
        file.truncate((export.parent / "decoder.onnx.data").stat().st_size)
    assert plan(tmp_path / "decoder.onnx") == plan(export)
    command = [sys.executable, "-m", "semkv_deploy.cli", "plan", str(tmp_path / "decoder.onnx"), "--budget", "0.2"]
    seconds = []
    for _ in range(3):  # other work on the machine may slow one of them
        before = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - before)
    assert min(seconds) < 2


def test_config_alone_gives_the_plan_of_the_export(narrow: Path, tmp_path: Path):
    """Norms that are equal share a tensor in the export; that is all the difference."""
    shutil.copy(narrow / "checkpoint" / "config.json", tmp_path)
    for target in ("onnxruntime-cpu", "tensorrt-rtx"):
        from_config = row(tmp_path, 0.25, target=target)
        from_export = row(narrow / "export" / "decoder.onnx", 0.25, target=target)
        assert from_config.total_bytes == pytest.approx(from_export.total_bytes, rel=0.002)
        assert from_config.weight_bytes == pytest.approx(from_export.weight_bytes, rel=0.005)


def cli(*arguments: object) -> Any:
    common = ["plan", "--method", "semanticache", "--native", "off"]
    return CliRunner().invoke(main, [*common, *map(str, arguments)], env={"COLUMNS": "80"})


def test_table_fits_a_narrow_terminal(export: Path):
    result = cli(export, "--budget", 0.25, "--budget", 1, "--batch", 1, "--batch", 8, "--memory", "100MiB")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80 and "…" not in result.output
    for text in ("keys and values", "cache read by a decode step", "largest context that fits", "batch 8"):
        assert text in result.output
    total = next(line for line in result.output.splitlines() if line.startswith("│ total  "))
    assert [float(cell) for cell in total.split("│")[2:-1]] == [
        round(each.total_bytes / MIB, 1) for each in plan(export, batches=[1, 8]).rows
    ]


def test_json_says_what_each_number_is_made_of(export: Path):
    result = cli(export, "--budget", 0.25, "--target", "tensorrt-rtx", "--dtype", "bfloat16", "--json")
    found = json.loads(result.output)
    assert found["rows"][0]["weight_bytes"] == row(export, 0.25, target="tensorrt-rtx").weight_bytes
    assert set(found["fields"]) == set(found["rows"][0]) and all(found["fields"].values())
    assert (found["stored_as"], found["layout"]) == ("bfloat16", "dual")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "1.5"], ["--budget: out of range", "0 < budget <= 1"]),
        (["--budget", "0.01"], ["too few to hold anything", "at least 128 slots"]),
        (["--budget", "0.5", "--memory", "8XB"], ["not a size", "got '8XB'"]),
        (["--budget", "0.5", "--max-context", "4097"], ["beyond the model's context", "1 to 4096 tokens, got 4097"]),
        (["--budget", "0.5", "--max-context", "0"], ["--max-context: out of range"]),
        (["--budget", "0.5", "--batch", "0"], ["--batch: out of range", "got 0"]),
        (["--budget", "0.5", "--target", "abacus"], ["--target abacus: cannot be planned for", "tensorrt-rtx"]),
        (
            ["--budget", "0.5", "--weights", "fp32", "--memory", "50MiB"],
            [
                "the weights alone need 52.0 MiB more",
                "at least 102.0 MiB, got 50.0 MiB",
                "Use --weights int8 (36.4 MiB",
            ],
        ),
        (
            ["--budget", "0.5", "--target", "tensorrt-rtx", "--memory", "60MiB"],
            ["the weights alone need 34.0 MiB more", "Use --layout single (51.0 MiB of weights)"],
        ),
        (
            ["--budget", "0.5", "--memory", "33MiB"],
            ["the weights and the smallest cache of budget 0.5 need", "Give more memory, or take a smaller model"],
        ),
        (
            ["--budget", "0.5", "--weights", "fp32", "--memory", "110MiB"],
            ["the weights, while they are loaded, need", "Use --weights int8 (36.4 MiB"],
        ),
        (
            ["--budget", "0.5", "--target", "tensorrt-rtx", "--memory", "100MiB"],
            ["the weights and the smallest cache of budget 0.5 need", "Use --layout single"],
        ),
    ],
)
def test_bad_input_is_one_sentence(export: Path, options: list[str], words: list[str]):
    result = cli(export, *options)
    assert result.exit_code == 1, result.output
    (line,) = result.output.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_sources_that_cannot_be_planned(export: Path, tmp_path: Path):
    with pytest.raises(SemkvError, match="no such file"):
        plan(tmp_path / "absent.onnx")
    with pytest.raises(SemkvError, match=r"no such file .*a directory with config.json"):
        plan(tmp_path / "absent")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(SemkvError, match=r"cannot be planned without loading weights.*Export it first"):
        plan(tmp_path / "model.gguf")
    os.link(export, tmp_path / "decoder.onnx")
    os.link(export.parent / "decoder.onnx.data", tmp_path / "decoder.onnx.data")
    with pytest.raises(SemkvError, match="not a model description"):
        plan(tmp_path / "decoder.onnx")
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(SemkvError, match="transformers makes no decoder of it"):
        plan(tmp_path)


def test_a_method_that_selects_reads_what_it_chooses_and_a_table(export: Path):
    """The table is counted with the cache; it is what blocks of the shortest length need, and one that is none's."""
    full, some, half = (
        row(export, 1.0, method=method_from_options(kind, options))
        for kind, options in (
            ("full", {}),
            ("dynsplit-select", {"attend": 128}),
            ("dynsplit-select", {"attend": 128, "representatives": "mean_radius"}),
        )
    )
    context = full.capacity
    slot = full.cache_bytes // context
    blocks = -(-context // 12) + 2
    # Of a slot, keys are half: smallest and largest are as much as a key and a value.
    assert some.cache_bytes == full.cache_bytes + blocks * slot
    assert some.read_bytes_per_step == 128 * slot + blocks * slot
    assert full.read_bytes_per_step == full.cache_bytes == some.full_read_bytes_per_step
    assert full.cache_bytes < half.cache_bytes < some.cache_bytes
    assert some.spare_bytes == 0
    on_gpu = row(export, 1.0, target="tensorrt-rtx", layout="split", method=method_from_options("dynsplit-select", {}))
    assert 0 < on_gpu.spare_bytes < on_gpu.cache_bytes

"""Validation of whole bundles: what passes, what fails and says why, what is skipped, what is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import build
from click.testing import CliRunner
from mutations import MUTATIONS, Graph
from onnx import numpy_helper

from semkv_deploy.bundle import Bundle, sha256, write_manifest
from semkv_deploy.cli import main
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Full, SemantiCache, StreamingLLM
from semkv_deploy.targets.onnxruntime.engine import inference_session
from semkv_deploy.targets.tensorrt import plugins as plugin_choice
from semkv_deploy.validate.checks import reference_graphs
from semkv_deploy.validate.compare import FLOAT16, INT8, TOLERANCES, CompareState, difference
from semkv_deploy.validate.report import as_json, as_page
from semkv_deploy.validate.results import CheckResult, Report
from semkv_deploy.validate.run import validate
from semkv_deploy.validate.runner import StatefulRunner
from semkv_deploy.validate.scenario import END_TURN, PREFILL, STEP, plan
from semkv_deploy.validate.ties import Before, Ties, run_compressor

STRICT = TOLERANCES["same weights, float32"]


@pytest.fixture(scope="module")
def quantised(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiny_export, tmp_path_factory.mktemp("int4") / "bundle", weights="int4", budgets=[0.5])


def test_quantised_weights_are_compared_with_themselves(quantised: Path):
    """The graph in float32 with the int4 weights on both sides, exactly; as shipped within a bound."""
    report = validate(quantised)
    assert report.passed
    results = {result.name: result for result in report.results}
    exact = results["float32 activations"]
    assert exact.slots_same == 1.0 and max(exact.max_absdiff.values()) < 1e-3 and exact.compressions > 0
    shipped = results["in place"]
    assert shipped.first_kl is not None and 0 < shipped.first_kl < 0.03 and shipped.max_absdiff["logits"] > 1e-2
    assert results["in place = copying"].max_absdiff["key"] == 0.0


def test_a_bundle_altered_while_it_is_validated_gets_no_report(quantised: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    shutil.copytree(quantised, bundle)
    file = bundle / "targets/onnxruntime-cpu/decoder.onnx.data"
    last = file.read_bytes()[-1] ^ 1

    def alter(what: str, share: float | None) -> None:
        # In place: the file is mapped.
        with file.open("r+b") as data:
            data.seek(-1, 2)
            data.write(bytes([last]))

    with pytest.raises(SemkvError, match=r"decoder\.onnx\.data: file of the bundle was altered"):
        validate(bundle, tokens=64, progress=alter)


def test_weights_of_another_model_are_no_rounding(quantised: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    shutil.copytree(quantised, bundle)
    path = bundle / "targets/onnxruntime-cpu/decoder.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "layers.01.self_attn.v_proj.weight_Q4":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
    path.with_name("decoder.onnx.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location="decoder.onnx.data")
    write_manifest(bundle, Bundle.open(quantised).manifest)
    (failed,) = [result for result in validate(bundle).results if result.status == "failed"]
    assert failed.name == "weights" and "layers.01.self_attn.v_proj" in failed.detail


def test_float16_graph_is_run_as_it_is_and_in_float32(tiny_export: Path, tmp_path: Path):
    bundle = build(tiny_export, tmp_path / "bundle", target="tensorrt-rtx", tensorrt={"dtype": "float16"})
    names = ("decoder aliases", "weights", "decoder graph in float32", "decoder graph in float16")
    report = validate(bundle)
    assert {result.name: result.status for result in report.results} == {
        **dict.fromkeys(names, "passed"),
        "engines": "skipped",
    }
    exact, rounded = (result.max_absdiff["logits"] for result in report.results if result.max_absdiff)
    assert exact < 1e-3 < rounded


def broken(bundle: Path, folder: Path, mutation: str, path: str) -> Path:
    """A copy of a bundle with one mistake in one graph."""
    shutil.copytree(bundle, folder)
    graph = Graph(folder / "targets" / "tensorrt-rtx" / path)
    MUTATIONS[mutation].make(graph)
    graph.sort()
    graph.save()
    write_manifest(folder, Bundle.open(bundle).manifest)
    return folder


def first_failure(report: Report) -> CheckResult:
    return next(result for result in report.results if result.status == "failed")


@pytest.mark.parametrize(("dtype", "batch"), [("float16", 2), ("bfloat16", 1)])
def test_both_graphs_of_the_split_layout_run_together(dtype: str, batch: int, tiny_export: Path, tmp_path: Path):
    """Prompts by one file, steps by the other, over the same caches; bfloat16 has no kernels here but in float32."""
    tensorrt = {"dtype": dtype, "layout": "split", "batch": batch}
    bundle = build(tiny_export, tmp_path / "bundle", target="tensorrt-rtx", tensorrt=tensorrt)
    report = validate(bundle)
    assert report.passed
    compared = {result.name: result for result in report.results if result.events}
    kinds = ["float32", "float16"] if dtype == "float16" else ["float32"]
    assert list(compared) == [f"prefill and decode graphs in {kind}" for kind in kinds]
    for result in compared.values():
        assert result.batch == batch and result.compressions > 0 and result.greedy_same == result.greedy_total
        assert [Path(name.split(";")[0]).name for name in result.ran.split(", ")] == [
            f"{phase}.0.25.onnx" for phase in ("prefill", "decode", "compressor")
        ]
    for phase, event in (("prefill", "turn 1 prefill"), ("decode", "turn 1 step 1")):
        path = broken(bundle, tmp_path / phase, "write_index_off_by_one", f"{phase}.0.25.onnx")
        failed = first_failure(validate(path))
        assert failed.failure is not None and failed.failure.event == event
        assert failed.bisection is not None and failed.bisection.what == "cache append (key)"


@pytest.mark.parametrize(("dtype", "layout"), [("float16", "dual"), ("bfloat16", "split")])
def test_what_lies_around_plugins_is_compared(
    dtype: str, layout: str, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Plugin nodes are run as their operators' bodies, and the report says so."""
    library = tmp_path / "libsemkv_plugins.so"
    library.write_bytes(b"copied into the bundle, never loaded")
    monkeypatch.setattr(plugin_choice, "_registered", lambda library, target: None)
    operators = ("nexus_attention", "semantic_cluster", "compact_cache")
    tensorrt = {"dtype": dtype, "layout": layout, "batch": 2, "plugins": operators, "plugin_library": library}
    bundle = build(tiny_export, tmp_path / "bundle", target="tensorrt-rtx", tensorrt=tensorrt)
    report = validate(bundle)
    compared = [result for result in report.results if result.events]
    assert report.passed and len(compared) == (2 if dtype == "float16" else 1)
    for result in compared:
        assert result.compressions > 0 and result.slots_same is not None and result.slots_same > 0.5
        assert "NexusAttention, SemanticCluster) as their operators' bodies, the plugins are not run" in result.ran
    assert compared[0].slots_same == 1.0 and compared[0].greedy_same == compared[0].greedy_total
    assert "the plugins are not run" in as_page(report)
    (engines,) = [result for result in report.results if result.status == "skipped"]
    assert engines.detail.endswith(
        "with the bodies of CompactCache, NexusAttention, SemanticCluster in place of the plugins"
    )
    decoder = "decoder" if layout == "dual" else "decode"
    for mutation, graph in (("layer_scrambled", decoder), ("sinks_ignored", "compressor")):
        path = broken(bundle, tmp_path / mutation, mutation, f"{graph}.0.25.onnx")
        bisection = first_failure(validate(path)).bisection
        assert bisection is not None and bisection.layer == MUTATIONS[mutation].layer
        assert any(word in bisection.what for word in MUTATIONS[mutation].what)


def test_nothing_compared_is_a_failure(both_targets: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    shutil.copytree(both_targets, bundle)
    manifest = Bundle.open(both_targets).manifest
    record = manifest.targets["tensorrt-rtx"]
    (built,) = record.budgets
    other = built.model_copy(update={"contract": built.contract.model_copy(update={"budget": 0.5})})
    record = record.model_copy(update={"budgets": [other]})
    write_manifest(bundle, manifest.model_copy(update={"targets": {**manifest.targets, "tensorrt-rtx": record}}))
    report = validate(bundle, budgets=[0.25])
    failed = first_failure(report)
    # Though the other target was compared.
    assert not report.passed and failed.target == "tensorrt-rtx" and any(result.events for result in report.results)
    assert failed.detail.startswith("nothing was compared: graphs not run: the target was not built for this budget")


def test_an_overflow_in_float16_fails(both_targets: Path, tmp_path: Path):
    """What is infinite as shipped is exact in float32, and comes after the first compression."""
    bundle = tmp_path / "bundle"
    shutil.copytree(both_targets, bundle)
    graph = Graph(bundle / "targets/tensorrt-rtx/compressor.0.25.onnx")

    def far_and_back(name: str) -> str:
        for factor in (2.0**15, 2.0**-15):
            wide = graph.add("Cast", [name], to=onnx.TensorProto.FLOAT)
            scaled = graph.add("Mul", [wide, graph.constant(factor, np.float32)])
            name = graph.add("Cast", [scaled], to=onnx.TensorProto.FLOAT16)
        return name

    graph.replace_output("key_cache_out", far_and_back)
    graph.sort()
    graph.save()
    write_manifest(bundle, Bundle.open(both_targets).manifest)
    report = validate(bundle, targets=["tensorrt-rtx"])
    results = {result.name: result for result in report.results}
    assert results["decoder graph in float32"].status == "passed"
    failure = results["decoder graph in float16"].failure
    assert failure is not None and failure.tensor == "key.00" and failure.got is not None and np.isinf(failure.got)
    # JSON knows no infinity.
    written = json.loads(as_json(report), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Report.model_validate({key: value for key, value in written.items() if key != "passed"}) == report


def test_a_distribution_far_off_after_a_compression_fails(both_targets: Path, tmp_path: Path):
    """Caches may differ by then; what they predict may not."""
    report = validate(broken(both_targets, tmp_path / "bundle", "evicts_the_newest", "compressor.0.25.onnx"))
    failure = {result.name: result for result in report.results}["decoder graph in float16"].failure
    assert failure is not None and failure.event == "all turns" and failure.tensor == "next-token distribution"


@pytest.mark.parametrize(
    "method",
    [StreamingLLM(), SemantiCache(cluster_by="head", merge_keys="cached"), Full()],
    ids=lambda method: method.kind,
)
def test_every_method(method: Any, tiny_export: Path, tmp_path: Path):
    budgets = [1.0] if method.kind == "full" else [0.25, 1.0]
    tensorrt = {"dtype": "float32"}
    targets = ["onnxruntime-cpu", "tensorrt-rtx"]
    bundle = build(tiny_export, tmp_path / "b", method=method, budgets=budgets, target=targets, tensorrt=tensorrt)
    report = validate(bundle)
    assert report.passed, [result.sentence() for result in report.results if result.status == "failed"]
    compared = [result for result in report.results if result.max_absdiff]
    assert {result.target for result in compared} == set(targets)
    assert all((result.compressions > 0) == (result.budget < 1) for result in compared)


def test_command_writes_a_report_and_leaves_the_bundle_alone(both_targets: Path, tmp_path: Path):
    before = {path: sha256(path) for path in both_targets.rglob("*") if path.is_file()}
    out = tmp_path / "reports"
    done = CliRunner().invoke(main, ["validate", str(both_targets), "--json", "--tokens", "200", "-o", str(out)])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "validate.json").read_text())
    assert report["passed"] and json.loads(done.stdout) == report
    assert {result["target"] for result in report["results"]} == {"onnxruntime-cpu", "tensorrt-rtx"}
    page = (out / "validate.html").read_text()
    assert "same weights, float32" in page and "polygraphy run onnx/decoder.onnx" in page
    assert before == {path: sha256(path) for path in both_targets.rglob("*") if path.is_file()}
    refused = CliRunner().invoke(main, ["validate", str(both_targets), "-o", str(both_targets / "reports")])
    assert refused.exit_code == 1 and "would change the bundle" in refused.output


def test_command_fails_with_one_sentence(both_targets: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    shutil.copytree(both_targets, bundle)
    path = bundle / "targets/onnxruntime-cpu/compressor.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        if node.output[0] == "in_window":
            node.op_type = "Less"
    onnx.save(model, path)
    write_manifest(bundle, Bundle.open(both_targets).manifest)
    arguments = ["validate", str(bundle), "--target", "onnxruntime-cpu", "-o", str(tmp_path / "reports")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "onnxruntime-cpu in place, budget 0.25" in line and "layer 0" in line
    assert not json.loads((tmp_path / "reports" / "validate.json").read_text())["passed"]
    missing = CliRunner().invoke(main, ["validate", str(bundle), "--budget", "0.3"])
    assert missing.exit_code == 1 and "no such budget" in missing.output


def test_scenario_overflows_and_is_ragged(tiny_bundle: Path):
    contract = Bundle.open(tiny_bundle).portable(0.25).contract
    scenario = plan(range(500), contract, batch=2, tokens=None)
    assert len(scenario.prompts[1][0]) > contract.capacity and scenario.tokens <= 512
    events = list(scenario.events(lambda: np.zeros(2, np.int64)))
    assert [event.kind for event in events].count(END_TURN) == 3
    assert all(first > second > 0 for first, second in (e.count for e in events if e.kind == PREFILL))
    assert any(event.kind == STEP and event.count.tolist() == [1, 0] for event in events)
    short = plan(range(500), contract, batch=1, tokens=60)
    assert short.tokens <= 60 and all(turn[0] for turn in short.prompts)
    with pytest.raises(SemkvError, match="too few tokens"):
        plan(range(500), contract, batch=1, tokens=20)


def test_runner_is_a_polygraphy_runner(tiny_bundle: Path):
    """It checks its inputs as Polygraphy's do, and reports what a graph raises instead of raising it."""
    from polygraphy.exception import PolygraphyException

    graphs = reference_graphs(Bundle.open(tiny_bundle), 0.25)
    runner = StatefulRunner("reference", lambda: graphs.open(1), 1)
    count = np.array([3], np.int64)
    with runner:
        outputs = runner.infer({"kind": np.array(PREFILL), "tokens": np.array([[5, 6, 7]]), "count": count})
        assert outputs["position"].tolist() == [3] and (outputs["slot_position.01"][0, 0, :4] == [0, 1, 2, -1]).all()
        assert outputs["key.00"][0, :, :3].any() and not outputs["key.00"][0, :, 3:].any()
        with pytest.raises(PolygraphyException):
            runner.infer({"kind": np.array(PREFILL)})
        assert not runner.infer({"kind": np.array(PREFILL), "tokens": np.array([[9999]]), "count": count[:1] - 2})
        assert runner.error is not None and "9999" in runner.error
    contract = graphs.opened.contract
    absent = contract.with_graphs("decode", [contract.decoders[0].model_copy(update={"onnx": "none.onnx"})])
    broken = graphs._replace(opened=dataclasses.replace(graphs.opened, contract=absent))
    missing = StatefulRunner("x", lambda: broken.open(1), 1)
    with missing:
        assert not missing.infer({"kind": np.array(END_TURN), "tokens": np.zeros((1, 0), np.int64), "count": count})
        assert missing.error is not None and "none.onnx" in missing.error


def test_only_a_proved_tie_is_settled(both_targets: Path):
    """At a threshold where a hair's breadth decides, the reference itself chooses differently: that is a tie."""
    opened = reference_graphs(Bundle.open(both_targets), 0.25).opened
    graph = inference_session(opened.path(opened.contract.compressors[0].onnx), threads=1)
    random = np.random.default_rng(3)
    layer: dict[str, Any] = {
        "key_cache": random.standard_normal((1, 2, 128, 16)).astype(np.float32),
        "value_cache": random.standard_normal((1, 2, 128, 16)).astype(np.float32),
        "slot_bias": np.zeros((1, 2, 128), np.float32),
        "length": np.array([128]),
        "slot_position": np.arange(128)[None, None],
        "slot_chunk": np.zeros((1, 1, 128), np.int64),
    }
    inputs = {"target": np.array([16]), "recent": np.array([0]), "sinks": np.array(4)}

    def compress(keys: Any, threshold: float) -> dict[str, Any]:
        thresholds = np.array([threshold], np.float32)
        return run_compressor(graph, {**layer, "key_cache": keys, **inputs, "thresholds": thresholds})

    low, high = 0.2, 0.4
    chosen = compress(layer["key_cache"], low)["slot_position_out"]
    while np.float32(high) > np.nextafter(np.float32(low), np.float32(1)):
        middle = (low + high) / 2
        same = np.array_equal(compress(layer["key_cache"], middle)["slot_position_out"], chosen)
        low, high = (middle, high) if same else (low, middle)
    # Noise of one part in 100,000, far within the tolerance, decides either way.
    for _ in range(64):
        moved = layer["key_cache"] + np.float32(1e-5) * random.standard_normal((1, 2, 128, 16)).astype(np.float32)
        if not np.array_equal(compress(moved, low)["slot_position_out"], chosen):
            break
    else:
        pytest.fail("no noise tipped the choice")
    inputs["thresholds"] = np.array([low], np.float32)
    expected, tipped = compress(layer["key_cache"], low), compress(moved, low)

    def settle(target_keys: Any, outcome: dict[str, Any]) -> tuple[int, Any, Any]:
        buffers = {
            "key": outcome["key_cache_out"].copy(),
            "value": outcome["value_cache_out"].copy(),
            "slot_bias": outcome["slot_bias_out"].copy(),
        }
        engine: Any = SimpleNamespace(
            contract=opened.contract,
            read=lambda name, group: buffers[name],
            write=lambda name, group, array: buffers.update({name: array}),
        )
        names = ("length_out", "slot_position_out", "slot_chunk_out", "level", "evicted")
        done = {0: {name: outcome[name] for name in names}}
        ties = Ties(opened, STRICT)
        target = Before({0: {**layer, "key_cache": target_keys}}, {0: inputs})
        settled = ties.settle(Before({0: layer}, {0: inputs}), target, engine, done)
        return ties.settled, settled[0], buffers

    count, settled, buffers = settle(moved, tipped)
    assert count == 1 and np.array_equal(settled["slot_position_out"], expected["slot_position_out"])
    np.testing.assert_array_equal(buffers["key"], expected["key_cache_out"])
    # A choice that the reference does not make from the target's layer is no tie, nor is one from another layer.
    wrong = {**tipped, "slot_position_out": np.roll(tipped["slot_position_out"], 1, axis=2)}
    assert settle(moved, wrong)[0] == 0
    far = layer["key_cache"] + np.float32(0.1) * random.standard_normal((1, 2, 128, 16)).astype(np.float32)
    assert settle(far, compress(far, low))[0] == 0
    assert settle(layer["key_cache"], expected)[0] == 0


def test_differences_are_exact_where_they_must_be():
    state = {
        "position": np.array([3]),
        "slot_position.00": np.array([[[0, 1, -1]]]),
        "compressions": np.array(0),
        "logits": np.array([[1.0, 2.0]]),
    }
    compare = CompareState(STRICT)
    assert all(compare(state, state).values())
    moved = {**state, "slot_position.00": np.array([[[0, 2, -1]]])}
    result = compare(state, moved)
    assert not result["slot_position.00"] and result["slot_position.00"].where == (0, 0, 1)
    assert compare(state, {**state, "logits": np.array([[1.0, 2.001]])})["logits"]
    assert not compare(state, {**state, "logits": np.array([[1.0, 2.01]])})["logits"]
    broken = difference(np.zeros(2, np.float32), np.array([0, np.nan], np.float32), 1e9)
    assert broken.max_absdiff == np.inf and broken.where == (1,)
    # A number that is no array.
    more = compare(state, {**state, "compressions": np.array(1)})["compressions"]
    assert not more and more.max_absdiff == 1.0 and more.where == ()


@pytest.mark.parametrize("kind", [FLOAT16, INT8])
def test_as_shipped_is_close_until_something_is_compressed(kind: str):
    state = {
        "position": np.array([3]),
        "slot_position.00": np.array([[[0, 1, -1]]]),
        "compressions": np.array(0),
        "key.00": np.array([[[[4.0], [1.0]]]], np.float32),
    }
    share, compare = TOLERANCES[kind].relative, CompareState(TOLERANCES[kind])
    near = {**state, "key.00": state["key.00"] + np.float32(3.9 * share)}
    far = {**state, "key.00": state["key.00"] + np.float32(4.1 * share)}
    moved = {**state, "slot_position.00": np.array([[[0, 2, -1]]])}
    assert all(compare(state, near).values())
    assert not compare(state, far)["key.00"] and not compare(state, moved)["slot_position.00"]
    assert not compare.compressed
    after = {**moved, "compressions": np.array(1), "key.00": far["key.00"]}
    assert all(compare(state, after).values()) and compare.compressed
    # Once compressed, always; but a number must be one, whatever the reference has.
    assert all(compare(state, far).values())
    for broken in (np.nan, np.inf):
        result = compare(state, {**state, "key.00": np.array([[[[4.0], [broken]]]], np.float32)})["key.00"]
        assert not result and result.where == (0, 0, 1, 0) and result.max_absdiff == np.inf
    infinite = {**state, "key.00": np.full((1, 1, 2, 1), np.inf, np.float32)}
    assert not compare(infinite, infinite)["key.00"]

"""Validation of whole bundles: what passes, what fails and says why, what is skipped, what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from semkv_deploy.build import build_bundle
from semkv_deploy.bundle import Bundle, sha256, write_manifest
from semkv_deploy.cli import main
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Full, SemantiCache, StreamingLLM
from semkv_deploy.validate.checks import Graphs, open_session, reference_graphs
from semkv_deploy.validate.compare import TOLERANCES, CompareState, difference
from semkv_deploy.validate.run import validate
from semkv_deploy.validate.runner import StatefulRunner
from semkv_deploy.validate.scenario import END_TURN, PREFILL, STEP, plan

STRICT = TOLERANCES["same weights, float32"]


def build(export: Path, out: Path, **options: Any) -> Path:
    from semkv_deploy.targets.tensorrt_build import TensorRTOptions

    options.setdefault("method", SemantiCache())
    options["tensorrt"] = TensorRTOptions(engines=False, **options.pop("tensorrt", {}))
    build_bundle(str(export / "decoder.onnx"), out, **{"budgets": [0.25], "weights": "fp32", **options})
    return out


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
    assert shipped.first_kl is not None and 0 < shipped.first_kl < 0.05 and shipped.max_absdiff["logits"] > 1e-2
    assert results["in place = copying"].max_absdiff["key"] == 0.0


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


def test_both_graphs_of_the_split_layout_in_bfloat16(tiny_export: Path, tmp_path: Path):
    """bfloat16 has no kernels here: only its graphs in float32 can be run."""
    tensorrt = {"dtype": "bfloat16", "layout": "split"}
    report = validate(build(tiny_export, tmp_path / "bundle", target="tensorrt-rtx", tensorrt=tensorrt))
    found = {result.name: result for result in report.results}
    assert report.passed
    assert all(found[f"{phase} graph in float32"].compressions > 0 for phase in ("prefill", "decode"))


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
    bundle = Bundle.open(tiny_bundle)
    profile = bundle.profile(0.25)
    scenario = plan(range(500), profile, max_context=512, batch=2, tokens=None)
    assert len(scenario.prompts[1][0]) > profile.capacity and scenario.tokens <= 512
    events = list(scenario.events(lambda: np.zeros(2, np.int64)))
    assert [event.kind for event in events].count(END_TURN) == 3
    assert all(first > second > 0 for first, second in (e.count for e in events if e.kind == PREFILL))
    assert any(event.kind == STEP and event.count.tolist() == [1, 0] for event in events)
    short = plan(range(500), profile, max_context=512, batch=1, tokens=60)
    assert short.tokens <= 60 and all(turn[0] for turn in short.prompts)
    with pytest.raises(SemkvError, match="too few tokens"):
        plan(range(500), profile, max_context=512, batch=1, tokens=20)


def test_runner_is_a_polygraphy_runner(tiny_bundle: Path):
    """It checks its inputs as Polygraphy's do, and reports what a graph raises instead of raising it."""
    from polygraphy.exception import PolygraphyException

    bundle = Bundle.open(tiny_bundle)
    profile = bundle.profile(0.25)
    graphs = reference_graphs(bundle, profile)
    runner = StatefulRunner("reference", lambda: open_session(bundle, profile, graphs, 1), 1)
    count = np.array([3], np.int64)
    with runner:
        outputs = runner.infer({"kind": np.array(PREFILL), "tokens": np.array([[5, 6, 7]]), "count": count})
        assert outputs["position"].tolist() == [3] and (outputs["slot_position.01"][0, 0, :4] == [0, 1, 2, -1]).all()
        assert outputs["key.00"][0, :, :3].any() and not outputs["key.00"][0, :, 3:].any()
        with pytest.raises(PolygraphyException):
            runner.infer({"kind": np.array(PREFILL)})
        assert not runner.infer({"kind": np.array(PREFILL), "tokens": np.array([[9999]]), "count": count[:1] - 2})
        assert runner.error is not None and "9999" in runner.error
    missing = StatefulRunner("x", lambda: open_session(bundle, profile, Graphs(Path("none.onnx"), None, True), 1), 1)
    with missing:
        assert not missing.infer({"kind": np.array(END_TURN), "tokens": np.zeros((1, 0), np.int64), "count": count})
        assert missing.error is not None and "none.onnx" in missing.error


def test_differences_are_exact_where_they_must_be():
    state = {"position": np.array([3]), "slot_position.00": np.array([[[0, 1, -1]]]), "logits": np.array([[1.0, 2.0]])}
    compare = CompareState(STRICT)
    assert all(compare(state, state).values())
    moved = {**state, "slot_position.00": np.array([[[0, 2, -1]]])}
    result = compare(state, moved)
    assert not result["slot_position.00"] and result["slot_position.00"].where == (0, 0, 1)
    assert all(CompareState(TOLERANCES["as shipped"])(state, moved).values())
    assert compare(state, {**state, "logits": np.array([[1.0, 2.001]])})["logits"]
    assert not compare(state, {**state, "logits": np.array([[1.0, 2.01]])})["logits"]
    broken = difference(np.zeros(2, np.float32), np.array([0, np.nan], np.float32), 1e9)
    assert broken.max_absdiff == np.inf and broken.where == (1,)

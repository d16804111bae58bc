"""Break one thing at a time: validation catches each, and the bisection names the layer and what is wrong in it."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import onnx
import pytest
from mutations import MUTATIONS, Graph

from semkv_deploy.bundle import Bundle, write_manifest
from semkv_deploy.validate.results import Report
from semkv_deploy.validate.run import validate

TARGETS = ["onnxruntime-cpu", "tensorrt-rtx"]

FLOAT16 = "decoder graph in float16"

CASES = [(mutation.bundle, target, name) for name, mutation in MUTATIONS.items() for target in TARGETS] + [
    # What these change looks different where attention is two products; the rest of the graph is the same.
    ("decomposed", "tensorrt-rtx", name)
    for name in ("bias_not_added", "mask_dropped", "scale_changed")
]


def graph_path(bundle: Path, target: str, kind: str) -> Path:
    folder = bundle / "targets" / target
    return folder / (f"{kind}.onnx" if target == "onnxruntime-cpu" else f"{kind}.0.25.onnx")


@pytest.mark.parametrize(
    ("fixture", "target", "attention"),
    [
        ("both_targets", "onnxruntime-cpu", "GroupQueryAttention"),
        ("both_targets", "tensorrt-rtx", "Attention"),
        ("windowed", "onnxruntime-cpu", "GroupQueryAttention"),
        ("windowed", "tensorrt-rtx", "Attention"),
        ("decomposed", "tensorrt-rtx", "Softmax"),
    ],
)
def test_the_unbroken_bundle_passes(fixture: str, target: str, attention: str, request: pytest.FixtureRequest):
    bundle = request.getfixturevalue(fixture)
    graph = onnx.load(graph_path(bundle, target, "decoder"), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert {kind: kinds[kind] for kind in ("GroupQueryAttention", "Attention", "Softmax") if kinds[kind]} == {
        attention: 2
    }
    report = validate(bundle, targets=[target])
    assert report.passed, [result.sentence() for result in report.results if result.status == "failed"]
    compared = [result for result in report.results if result.max_absdiff]
    assert compared and all(result.compressions >= 3 and result.evicted > 0 for result in compared)
    assert any(result.name == FLOAT16 for result in compared) == (attention == "Attention")
    exact = [result for result in compared if result.name != FLOAT16]
    assert exact and all(result.slots_same == 1.0 and result.greedy_same == result.greedy_total for result in exact)


@pytest.mark.parametrize(("fixture", "target", "name"), CASES, ids=lambda part: part)
def test_a_mistake_is_caught_and_named(
    fixture: str, target: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
):
    mutation, original = MUTATIONS[name], request.getfixturevalue(fixture)
    bundle = tmp_path / "bundle"
    shutil.copytree(original, bundle)
    graph = Graph(graph_path(bundle, target, mutation.graph))
    mutation.make(graph)
    graph.sort()
    graph.save()
    write_manifest(bundle, Bundle.open(original).manifest)
    report = validate(bundle, targets=[target])
    sentences = [result.sentence() for result in report.results]
    assert not report.passed
    assert _caught(report, mutation.aliases, mutation.layer, mutation.what), sentences
    if mutation.as_shipped and target == "tensorrt-rtx" and fixture != "decomposed":
        assert [result.status for result in report.results if result.name == FLOAT16] == ["failed"], sentences


def _caught(report: Report, aliases: bool, layer: int | None, what: tuple[str, ...]) -> bool:
    failed = [result for result in report.results if result.status == "failed"]
    if aliases:
        return failed[0].name.endswith("aliases") and what[0] in failed[0].detail
    found = [result.bisection for result in failed if result.bisection is not None]
    return bool(found) and all(each.layer == layer and any(word in each.what for word in what) for each in found)

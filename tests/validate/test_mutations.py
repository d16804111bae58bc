"""Break one thing at a time: validation catches each, and the bisection names the layer and what is wrong in it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutations import MUTATIONS, Graph

from semkv_deploy.bundle import Bundle, write_manifest
from semkv_deploy.validate.results import Report
from semkv_deploy.validate.run import validate

TARGETS = ["onnxruntime-cpu", "tensorrt-rtx"]


def graph_path(bundle: Path, target: str, kind: str) -> Path:
    folder = bundle / "targets" / target
    return folder / (f"{kind}.onnx" if target == "onnxruntime-cpu" else f"{kind}.0.25.onnx")


@pytest.mark.parametrize("target", TARGETS)
def test_the_unbroken_bundle_passes(both_targets: Path, target: str):
    report = validate(both_targets, targets=[target])
    assert report.passed, [result.sentence() for result in report.results if result.status == "failed"]
    compared = [result for result in report.results if result.max_absdiff]
    assert compared and all(result.compressions >= 3 and result.evicted > 0 for result in compared)
    # Without merged cores, a bias that is not added would not show.
    assert all(result.slots_same == 1.0 and result.greedy_same == result.greedy_total for result in compared)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_caught_and_named(name: str, target: str, both_targets: Path, tmp_path: Path):
    mutation = MUTATIONS[name]
    bundle = tmp_path / "bundle"
    shutil.copytree(both_targets, bundle)
    graph = Graph(graph_path(bundle, target, mutation.graph))
    mutation.make(graph)
    graph.sort()
    graph.save()
    write_manifest(bundle, Bundle.open(both_targets).manifest)
    report = validate(bundle, targets=[target])
    assert not report.passed
    assert _caught(report, mutation.aliases, mutation.layer, mutation.what), [
        result.sentence() for result in report.results
    ]


def _caught(report: Report, aliases: bool, layer: int | None, what: tuple[str, ...]) -> bool:
    failed = [result for result in report.results if result.status == "failed"]
    if aliases:
        return failed[0].name.endswith("aliases") and what[0] in failed[0].detail
    found = [result.bisection for result in failed if result.bisection is not None]
    return bool(found) and all(each.layer == layer and any(word in each.what for word in what) for each in found)

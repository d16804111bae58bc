"""The target onnxruntime-cuda where there is no GPU: what is built, and what is said of what cannot be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from semkv_deploy import open_bundle
from semkv_deploy.bundle import Bundle, OnnxRuntimeRecord
from semkv_deploy.cli.bundle_summary import summary
from semkv_deploy.cli.lint_report import lint_file
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import SemantiCache
from semkv_deploy.targets import open_engine
from semkv_deploy.targets.onnxruntime import native, place
from semkv_deploy.validate.run import validate

TARGET = "onnxruntime-cuda"


def graph(root: Path, name: str) -> onnx.ModelProto:
    return onnx.load(root / "targets" / TARGET / name, load_external_data=False)


def forms(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node if node.domain == "semkv"}


def test_graphs_have_the_forms_that_kernels_have(cuda_bundles: Path) -> None:
    """And no bodies for them, which would run elsewhere without a word."""
    assert forms(graph(cuda_bundles / "semanticache", "decoder.onnx")) == {"NexusAttention"}
    compressor = graph(cuda_bundles / "semanticache", "compressor.onnx")
    assert forms(compressor) == {"SemanticCluster", "CompactCache"}
    assert not {function.name for function in compressor.functions} & {"SemanticCluster", "CompactCache"}
    assert forms(graph(cuda_bundles / "importance", "compressor.onnx")) == {"CompactCache"}
    linted = lint_file(cuda_bundles / "semanticache" / "targets" / TARGET / "decoder.onnx", TARGET, native=1)
    assert not any(found.fatal for found in linted.findings)


def test_the_bundle_says_what_it_is(cuda_bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(cuda_bundles / "importance")
    contract = bundle.built(TARGET, 0.5).contract
    assert (contract.native, contract.dtype, contract.target) == (native.CUDA_VERSION, "float32", TARGET)
    record = bundle.target(TARGET)
    assert isinstance(record, OnnxRuntimeRecord) and record.weight_kl is not None and record.weight_kl > 0
    summary(bundle)
    said = " ".join(capsys.readouterr().out.split())
    assert "onnxruntime-cuda: float32 caches; native operators 1: no_library_for_cuda.so 1 is not here" in said


def test_without_its_provider_it_does_not_open(cuda_bundles: Path) -> None:
    words = r"CUDAExecutionProvider: pip install 'semkv-deploy\[gpu\]'"
    with pytest.raises(SemkvError, match=f"--target onnxruntime-cuda: does not run on this machine.*{words}"):
        open_bundle(cuda_bundles / "semanticache", target=TARGET)
    with pytest.raises(SemkvError, match=words):
        open_engine(Bundle.open(cuda_bundles / "semanticache").built(TARGET, 0.5))


def test_without_its_library_it_does_not_open(cuda_bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = place.CUDA._replace(provider="CPUExecutionProvider", options={}, device=("cpu", 0))
    monkeypatch.setitem(place.PLACES, TARGET, here)
    with pytest.raises(SemkvError, match=r"No no_library_for_cuda\.so: build it with scripts/build_native\.sh cuda"):
        open_bundle(cuda_bundles / "semanticache", target=TARGET)
    with pytest.raises(
        SemkvError, match=r"expected no_library_for_cuda\.so of version 1.*scripts/build_native\.sh cuda"
    ):
        open_engine(Bundle.open(cuda_bundles / "semanticache").built(TARGET, 0.5))


def test_a_session_that_found_no_device_is_refused() -> None:
    """ONNX Runtime prints a warning and goes on with the CPU provider."""
    from semkv_deploy.targets.onnxruntime.engine import _on

    class Fallen:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    with pytest.raises(SemkvError, match=r"made a session without CUDAExecutionProvider.*got CPUExecutionProvider"):
        _on(place.CUDA, Fallen())


def test_validation_says_that_nothing_was_run(cuda_bundles: Path) -> None:
    report = validate(cuda_bundles / "semanticache", targets=[TARGET], tokens=64)
    skipped = [result for result in report.results if result.name == "in place"]
    assert len(skipped) == 1 and "not run: this onnxruntime has no CUDAExecutionProvider" in str(skipped[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"native": "off"}, r"--native off: attention in place on CUDA takes the native operators"),
        ({"cache_dtype": "int8"}, r"--cache-dtype int8: graphs of onnxruntime-cuda have no such caches yet"),
        ({}, r"head size is one that the CUDA kernels do not take.*expected 64 or 80 or 96 or 128 or 256, got 16"),
    ],
)
def test_what_cannot_be_built_is_said(tiny_export: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    build: dict[str, Any] = {"budgets": [0.25], "weights": "fp32", "method": SemantiCache(), **options}
    with pytest.raises(SemkvError, match=f"(?s){words}"):
        build_bundle(tiny_export / "decoder.onnx", tmp_path / "b", target=TARGET, **build)
    assert not (tmp_path / "b").exists()

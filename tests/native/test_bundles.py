"""Bundles with native operators: built, validated, run, saved; and opened where their library is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from contract_host import Host
from numpy.typing import NDArray

from semkv_deploy import open_bundle, open_session
from semkv_deploy.bundle import Bundle, OnnxRuntimeRecord
from semkv_deploy.cli.bundle_summary import summary
from semkv_deploy.cli.lint_report import lint_bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.lint.onnxruntime import lint_onnxruntime
from semkv_deploy.methods import Importance, SemantiCache, StreamingLLM
from semkv_deploy.runtime.session import Session
from semkv_deploy.targets.onnxruntime import native
from semkv_deploy.validate.run import validate

pytestmark = pytest.mark.usefixtures("installed")

CACHES = ["float32", "float16", "bfloat16", "int8"]
TARGET = "onnxruntime-cpu"


@pytest.fixture(scope="module")
def bundles(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By cache type, and "off" without native operators."""
    folder, decoder = tmp_path_factory.mktemp("native"), tiny_export / "decoder.onnx"
    options: dict[str, Any] = {"budgets": [0.25, 1.0], "method": SemantiCache(), "weights": "fp32"}
    for dtype in CACHES:
        build_bundle(decoder, folder / dtype, native="on", cache_dtype=dtype, **options)  # type: ignore[arg-type]
    build_bundle(decoder, folder / "off", native="off", **options)
    return {name: folder / name for name in [*CACHES, "off"]}


def conversation(session: Session) -> NDArray[np.float32]:
    """Logits of two rows over prompts, steps and compressions."""
    rng, seen = np.random.default_rng(0), []
    for count in (100, 3, 120):
        rows = [rng.integers(2, 500, n).tolist() for n in (count, count // 2 + 1)]
        seen.append(session.prefill(rows).copy())
        seen += [session.step(rng.integers(2, 500, 2)).copy() for _ in range(3)]
    return np.concatenate(seen)


def opened(root: Path, budget: float = 0.25, **options: Any) -> Session:
    return open_session(open_bundle(root), budget=budget, batch=2, **options)


@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_float32_is_what_it_is_without_native_operators(bundles: dict[str, Path], budget: float) -> None:
    """The same logits within rounding, the same slots chosen."""
    with_native, without = (opened(bundles[name], budget) for name in ("float32", "off"))
    np.testing.assert_allclose(conversation(with_native), conversation(without), atol=2e-4)
    assert (with_native.stats.runs > 0) == (budget < 1)
    for ours, theirs in zip(with_native.slot_position, without.slot_position, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", CACHES)
def test_in_place_and_copying_give_the_same(bundles: dict[str, Path], dtype: str) -> None:
    first, second = (conversation(opened(bundles[dtype], in_place=each)) for each in (True, False))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("dtype", CACHES)
def test_validation_passes(bundles: dict[str, Path], dtype: str) -> None:
    report = validate(bundles[dtype], budgets=[0.25], tokens=200)
    assert report.passed
    checks = {result.name for result in report.results}
    assert ("float32 caches" in checks) == (dtype != "float32")


@pytest.mark.parametrize(("queries", "dtype"), [("repeat", "int8"), ("repeat", "float16"), ("predicted", "int8")])
def test_narrow_caches_are_widened_where_others_read_them(
    tiny_export: Path, tmp_path: Path, queries: Any, dtype: Any
) -> None:
    """The decoder that records attention reads keys in a branch; a program that scores reads them and writes none."""
    method = Importance(queries=queries, fit="none")
    options: dict[str, Any] = {"budgets": [0.25], "budget_by": "head", "weights": "fp32", "native": "on"}
    build_bundle(tiny_export / "decoder.onnx", tmp_path / "b", method=method, cache_dtype=dtype, **options)
    report = validate(tmp_path / "b", tokens=300)
    assert report.passed, [result.detail for result in report.results]


def test_a_validation_that_must_fail_does(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it finds in a native graph with a wrong scale is bisected to the layer."""
    from semkv_deploy.targets.onnxruntime import engine

    whole = engine.inference_session

    def spoilt(graph: Any, **options: Any) -> Any:
        if options.get("native") is not None:
            model = onnx.load_from_string(graph.model) if not isinstance(graph, Path) else None
            if model is not None:
                node = next(node for node in model.graph.node if node.name == "layers.1.attention")
                next(each for each in node.attribute if each.name == "scale").f *= 1.5
                graph.model = model.SerializeToString()
        return whole(graph, **options)

    monkeypatch.setattr(engine, "inference_session", spoilt)
    report = validate(bundles["float32"], budgets=[1.0], tokens=64)
    assert not report.passed


@pytest.mark.parametrize(("dtype", "bytes_a_row"), [("float32", 64), ("float16", 32), ("bfloat16", 32), ("int8", 20)])
def test_bytes_are_those_of_the_type(bundles: dict[str, Path], dtype: str, bytes_a_row: int) -> None:
    """A budget in bytes is a budget in these bytes: 16 elements a row, int8 with a scale."""
    session = opened(bundles[dtype], 1.0)
    slots = 512 * 2 * 2 * 2  # slots, layers, KV heads, keys and values
    assert session.contract.cache_bytes(1) == slots * bytes_a_row
    biases = 512 * 2 * 2 * 4
    assert session.engine.cache_bytes() >= 2 * (slots * bytes_a_row + biases)
    assert Bundle.open(bundles[dtype]).share(f"{128 * 2 * 2 * 2 * bytes_a_row}B") == 0.25


def test_rows_lie_in_as_few_cache_lines_as_they_can(bundles: dict[str, Path]) -> None:
    """Steps that read chosen slots take every line that a row touches; so do the buffers that a compression gives."""
    session = opened(bundles["int8"])
    conversation(session)
    assert session.stats.runs > 0
    for name in ("key", "value", "key_scale", "slot_bias"):
        for group in range(2):
            assert session.engine.read(name, group).ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", CACHES)
def test_a_saved_session_goes_on(bundles: dict[str, Path], dtype: str, tmp_path: Path) -> None:
    session = opened(bundles[dtype])
    conversation(session)
    session.save(tmp_path / "state.safetensors")
    other = opened(bundles[dtype], state=tmp_path / "state.safetensors")
    np.testing.assert_array_equal(session.step([5, 6]), other.step([5, 6]))


def test_a_method_without_biases(tiny_export: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"budgets": [0.25], "method": StreamingLLM(), "weights": "fp32"}
    sessions = []
    for name in ("on", "off"):
        build_bundle(tiny_export / "decoder.onnx", tmp_path / name, native=name, **options)  # type: ignore[arg-type]
        sessions.append(opened(tmp_path / name))
    assert not any("slot_bias" in tensor.name for tensor in sessions[0].contract.decoders[0].inputs)
    np.testing.assert_allclose(*map(conversation, sessions), atol=2e-4)


def test_quantised_weights_over_int8_caches(tiny_export: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"budgets": [0.5], "method": SemantiCache(), "weights": "int4"}
    bundle = build_bundle(tiny_export / "decoder.onnx", tmp_path / "b", native="on", cache_dtype="int8", **options)
    record = bundle.target(TARGET)
    assert isinstance(record, OnnxRuntimeRecord)
    assert record.weight_kl is not None and record.cache_kl is not None and 0 < record.cache_kl < record.weight_kl
    assert validate(bundle.root, tokens=160).passed


def test_the_bundle_says_what_it_is(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    contract = Bundle.open(bundles["int8"]).built(TARGET, 1.0).contract
    assert (contract.native, contract.dtype) == (native.VERSION, "int8")
    assert len(contract.decoders[0].aliases) == 8
    summary(Bundle.open(bundles["int8"]))
    summary(Bundle.open(bundles["off"]))
    said = " ".join(capsys.readouterr().out.split())
    assert "int8 caches, KL 0.0" in said and "native operators 2: libsemkv_onnxruntime.so 2 is here" in said
    assert "float32 caches; no native operators: --native off" in said


def test_without_its_library_a_bundle_does_not_open(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", Path("nowhere") / "libsemkv_onnxruntime.so")
    with pytest.raises(SemkvError) as caught:
        opened(bundles["float32"])
    message = str(caught.value)
    assert "the bundle's graphs have native operators" in message
    assert "libsemkv_onnxruntime.so of version 2" in message and "build the bundle with --native off" in message
    opened(bundles["off"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_host_of_the_contract_alone_does_the_same(bundles: dict[str, Path], dtype: str, native_library: Path) -> None:
    session, host = opened(bundles[dtype]), Host(bundles[dtype], TARGET, batch=2, library=native_library)
    rng = np.random.default_rng(1)
    for _ in range(3):
        prompts = [rng.integers(2, 500, count).tolist() for count in (70, 45)]
        expected = session.prefill(prompts)
        logits = np.stack([host.prompt(row, ids) for row, ids in enumerate(prompts)])
        for _ in range(3):
            np.testing.assert_array_equal(logits, expected)
            tokens = expected.argmax(-1)
            expected, logits = session.step(tokens).copy(), host.step(tokens, [True, True])
        session.end_turn()
        host.end_turn()
    assert host.compressions == session.stats.runs > 1
    with pytest.raises(ValueError, match=r"libsemkv_onnxruntime\.so of version 2"):
        Host(bundles[dtype], TARGET)


def test_lint_takes_native_nodes_where_they_are_meant(bundles: dict[str, Path]) -> None:
    assert not any(finding.fatal for linted in lint_bundle(bundles["int8"]) for finding in linted.findings)
    decoder = onnx.load(bundles["int8"] / "targets" / TARGET / "decoder.onnx", load_external_data=False)
    assert {finding.rule for finding in lint_onnxruntime(decoder)} >= {"not_lowered"}

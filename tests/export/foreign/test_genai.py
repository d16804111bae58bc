"""Graphs of onnxruntime-genai's builder: imported and proved, or refused by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from semkv_deploy import open_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import import_decoder

pytest.importorskip("onnxruntime_genai")


@pytest.fixture(scope="module", params=["fp32", "int4"])
def genai(request: pytest.FixtureRequest, genai_exported: Callable[[str], Path]) -> Path:
    return genai_exported(request.param)


def test_import_is_proved_against_the_original(genai, tmp_path):
    facts = import_decoder(genai / "model.onnx", tmp_path)
    assert (facts.layers, facts.query_heads, facts.kv_heads, facts.head_dim) == (2, 4, 2, 16)
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    assert sum(node.op_type == "NexusAttention" for node in graph.node) == 2


def test_weights_with_several_names_are_refused(genai, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(genai, source)
    (tmp_path / "again").hardlink_to(source / "model.onnx.data")
    with pytest.raises(SemkvError, match=r"model.onnx.data: .*several names.*symbolic link"):
        import_decoder(source / "model.onnx", tmp_path / "out")


def attribute(name: str, value: float) -> Callable[[onnx.NodeProto], None]:
    def change(node: onnx.NodeProto) -> None:
        kept = [entry for entry in node.attribute if entry.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


def shared(node: onnx.NodeProto) -> None:
    node.input[3], node.input[4] = "past_key_values.0.key", "past_key_values.0.value"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (attribute("rotary_interleaved", 1), "interleaved rotary"),
        (attribute("smooth_softmax", 1), "smooth_softmax"),
        (attribute("sliding_window_cache", 1), "cache of its window alone, .*windowed_kv_cache=false"),
        (lambda node: node.input.__setitem__(5, node.input[6]), "seqlens_k of another origin"),
        (lambda node: node.input.__setitem__(3, ""), "attention without a past"),
        (shared, "share a cache"),
        (lambda node: setattr(node, "domain", "mine"), "custom domain"),
    ],
)
def test_what_is_not_known_is_refused(genai, tmp_path, change, said):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(genai, source)
    out.mkdir()
    model = onnx.load(source / "model.onnx", load_external_data=False)
    change([node for node in model.graph.node if node.op_type == "GroupQueryAttention"][-1])
    (source / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SemkvError, match=said):
        import_decoder(source / "model.onnx", out)


def test_proof_catches_a_wrong_import(genai, tmp_path, monkeypatch):
    from semkv_deploy.export.foreign import gqa

    monkeypatch.setattr(
        gqa,
        "attribute",
        lambda node, name, default: (
            0.5 if name == "scale" else (node.attributes[name].value if name in node.attributes else default)
        ),
    )
    with pytest.raises(SemkvError, match="not the original"):
        import_decoder(genai / "model.onnx", tmp_path)


def run(*words: str, where: Path) -> None:
    command = [sys.executable, "-m", "semkv_deploy.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=where)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_bundle_of_it_is_valid(genai, tmp_path):
    """Quantised weights are kept, and compared with what they were, activations in float32."""
    options = ["--budget", "0.5", "--max-context", "512", "--weights", "fp32", "--native", "off"]
    run("build", str(genai / "model.onnx"), *options, "-o", "bundle", where=tmp_path)
    stored = open_bundle(tmp_path / "bundle").target("onnxruntime-cpu").weights
    quantised = any(node.op_type == "MatMulNBits" for node in onnx.load(genai / "model.onnx").graph.node)
    assert stored == ("kept" if quantised else "fp32")
    run("validate", "bundle", "--tokens", "400", where=tmp_path)

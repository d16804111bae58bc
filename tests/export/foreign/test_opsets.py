"""Old opsets, as TorchScript writes them: raised, imported and proved against the file as it was, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnxscript import version_converter

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import import_decoder, recognised
from semkv_deploy.export.foreign.opsets import CONVERTED
from semkv_deploy.ops import OPSET

from .conftest import TorchExported


@pytest.mark.parametrize("opset", [13, 14, 17])
def test_an_old_opset_is_raised_and_the_import_proved(opset: int, torch_exported: TorchExported, tmp_path: Path):
    source = torch_exported("llama", opset=opset)
    assert onnx.load(source, load_external_data=False).opset_import[0].version == opset
    assert "attention of MatMul and Softmax" in str(recognised(source))
    facts = import_decoder(source, tmp_path)
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False)
    assert sum(node.op_type == "NexusAttention" for node in graph.graph.node) == facts.layers == 1
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == OPSET


def test_an_opset_that_nobody_raises_is_refused(torch_exported: TorchExported, tmp_path: Path):
    source = torch_exported("llama", opset=14)
    for path in source.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load(source)
    model.opset_import[0].version = CONVERTED - 1
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(SemkvError, match=rf"opset.*expected {CONVERTED} to {OPSET}, got {CONVERTED - 1}"):
        import_decoder(tmp_path / "model.onnx", tmp_path / "out")


@pytest.mark.parametrize(("error", "why"), [(None, "gives up"), (RuntimeError("no adapter"), "no adapter")])
def test_a_converter_that_fails_is_named(
    error: Exception | None, why: str, torch_exported: TorchExported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def convert(*_: Any, **__: Any) -> None:
        if error:
            raise error

    monkeypatch.setattr(version_converter, "convert_version", convert)
    with pytest.raises(SemkvError, match=rf"of opset 14, which cannot be raised to 18.*{why}.*Export the model again"):
        import_decoder(torch_exported("llama", opset=14), tmp_path)

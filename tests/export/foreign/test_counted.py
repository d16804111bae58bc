"""Decoders without position_ids: what they count from sizes is found, whatever its spelling, and told instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import import_decoder, recognised

from .conftest import TorchExported


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("llama", {}), ("mistral", {"sliding_window": 48}), ("gpt2", {"num_key_value_heads": 4})],
    ids=["rotary", "window", "learned"],
)
def test_counted_positions_are_told(name: str, overrides: Any, torch_exported: TorchExported, tmp_path: Path):
    source = torch_exported(name, positions=False, **overrides)
    assert {value.name for value in onnx.load(source, load_external_data=False).graph.input} & {"position_ids"} == set()
    assert "positions: counted" in str(recognised(source))
    # The proof has rows of the batch, and pieces after others: positions that were not told would show.
    import_decoder(source, tmp_path)
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    assert "position_ids" in {value.name for value in graph.input}


def test_positions_that_count_otherwise_are_refused(torch_exported: TorchExported, tmp_path: Path):
    """Every other position: no host would tell it."""
    source = torch_exported("llama", positions=False)
    for path in source.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load(source)
    made = {output: node for node in model.graph.node for output in node.output}
    node = next(node for node in model.graph.node if node.op_type == "Cos")
    while node.op_type != "Unsqueeze":
        node = made[node.input[0]]
    double = onnx.helper.make_node("Add", [node.input[0], node.input[0]], ["doubled"])
    node.input[0] = "doubled"
    model.graph.node.insert(list(model.graph.node).index(node), double)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(SemkvError, match="counts positions by the length of its cache"):
        import_decoder(tmp_path / "model.onnx", tmp_path / "out")

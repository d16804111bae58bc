"""Changed graphs are imported as they are or not at all; a wrong import without a word is the failure."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import import_decoder, proof
from semkv_deploy.export.foreign.interface import find_interface
from semkv_deploy.export.foreign.original import names_of
from semkv_deploy.export.foreign.portable import to_portable
from semkv_deploy.graph.files import write_model
from semkv_deploy.model.config import ModelFacts

from .conftest import TorchExported
from .mutations import mutate

CASES = 70
"""Changes of each graph."""


@pytest.fixture(params=["softmax", "attention", "genai"])
def source(
    request: pytest.FixtureRequest, torch_exported: TorchExported, genai_exported: Callable[[str], Path]
) -> Path:
    """MatMul and Softmax; `Attention`; two layers of GroupQueryAttention, which turns queries and keys itself."""
    if request.param == "genai":
        pytest.importorskip("onnxruntime_genai")
        return genai_exported("fp32") / "model.onnx"
    of_operator = {"opset": 23, "num_key_value_heads": 4} if request.param == "attention" else {}
    return torch_exported("llama", **of_operator)


def imported(model: onnx.ModelProto, path: Path, facts: ModelFacts) -> float:
    """What `import_decoder` does with a graph whose facts are known: the rules, the rewriting, the proof.

    Raises:
        SemkvError: as it does.
    """
    path.write_bytes(model.SerializeToString())
    graph = ir.load(path)
    roles = find_interface(graph, path.name)
    names = names_of(roles)
    layers = tuple(replace(layer, query_heads=facts.query_heads) for layer in roles.layers)
    to_portable(graph, replace(roles, layers=layers), facts.head_dim)
    write_model(graph, path.with_name("decoder.onnx"))
    proof.check_import(path, path.with_name("decoder.onnx"), facts, names)
    with pytest.MonkeyPatch.context() as patch:
        # Again, at other lengths and with other numbers: what is let through has to be the same function there.
        patch.setattr(proof, "_PIECES", {1: (31, 2, 1), 3: (4, 1)})
        patch.setattr(proof, "_LATE", 77)
        try:
            return proof.check_import(path, path.with_name("decoder.onnx"), facts, names)
        except SemkvError as error:
            raise AssertionError(f"imported as another function: {error}") from error


@pytest.fixture
def place(tmp_path: Path, source: Path) -> Iterator[Path]:
    """A folder with the weights of the source."""
    for file in source.parent.iterdir():
        if file.is_file() and file != source:
            shutil.copyfile(file, tmp_path / file.name)
    return tmp_path / source.name


Named = Callable[[list[onnx.NodeProto], onnx.GraphProto], None]


def attribute(name: str, value: float) -> Named:
    """Of the last attention."""

    def change(attentions: list[onnx.NodeProto], graph: onnx.GraphProto) -> None:
        node = attentions[-1]
        node.attribute.remove(next(each for each in node.attribute if each.name == name))
        node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


def other_layers_caches(attentions: list[onnx.NodeProto], graph: onnx.GraphProto) -> None:
    first, last = attentions
    first.input[3], last.input[3] = last.input[3], first.input[3]


def keys_as_values(attentions: list[onnx.NodeProto], graph: onnx.GraphProto) -> None:
    (node, _) = attentions
    node.input[3], node.input[4] = node.input[4], node.input[3]


def mask_dropped(attentions: list[onnx.NodeProto], graph: onnx.GraphProto) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([12], np.int32), "always"))
    attentions[0].input[5] = "always"


def rotary_on_half(attentions: list[onnx.NodeProto], graph: onnx.GraphProto) -> None:
    for place, name in ((7, "half_cos"), (8, "half_sin")):
        table = next(each for each in graph.initializer if each.name == attentions[0].input[place])
        whole = onnx.numpy_helper.to_array(table)
        graph.initializer.append(onnx.numpy_helper.from_array(whole[:, : whole.shape[1] // 2].copy(), name))
        for node in attentions:
            node.input[place] = name


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (attribute("scale", 0.5), "taken"),
        (attribute("local_window_size", 5), "taken"),
        (attribute("softcap", 3.0), "taken"),
        (
            other_layers_caches,
            "a cache comes out under another layer's name .*expected present.1.key, as past_key_values.1.key",
        ),
        (keys_as_values, "layers disagree about what is called a key"),
        (mask_dropped, "seqlens_k of another origin"),
        (rotary_on_half, "ONNX Runtime does not run the original"),
    ],
)
@pytest.mark.parametrize("source", ["genai"], indirect=True)
def test_a_change_that_has_a_name(change: Named, verdict: str, source: Path, place: Path, tmp_path: Path):
    """Taken: as the function that it is now, which is not the one that it was."""
    (tmp_path / "whole").mkdir()
    facts = import_decoder(source, tmp_path / "whole")
    model = onnx.load(source)
    change([node for node in model.graph.node if node.op_type == "GroupQueryAttention"], model.graph)
    try:
        imported(model, place, facts)
    except SemkvError as error:
        assert re.search(verdict, str(error)), error
        return
    assert "taken" in verdict
    graph = ir.load(source)
    with pytest.raises(SemkvError, match="the import is not the original"):
        proof.check_import(source, place.with_name("decoder.onnx"), facts, names_of(find_interface(graph, source.name)))


def test_a_changed_graph_is_imported_as_it_is_or_not_at_all(source: Path, place: Path, tmp_path: Path):
    (tmp_path / "whole").mkdir()
    facts = import_decoder(source, tmp_path / "whole")
    taken: list[str] = []
    refused: list[str] = []
    for seed in range(CASES):
        model = onnx.load(source)
        done = mutate(model.graph, seed)
        try:
            imported(model, place, facts)
            taken.append(done)
        except SemkvError as error:
            assert str(error), done
            refused.append(done)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {done}") from error
    assert min(len(taken), len(refused)) >= CASES // 8, (len(taken), len(refused))

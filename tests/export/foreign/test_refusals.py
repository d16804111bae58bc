"""Decoders that no rule takes are refused by what they are, before anything is built."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from semkv_deploy.cli.main import main
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import import_decoder
from semkv_deploy.runtime.open import open_bundle

from .conftest import TorchExported
from .test_multi_head import add, constant

Change = Callable[[onnx.GraphProto], None]
KEY = "past_key_values.0.key"


def head(graph: onnx.GraphProto) -> onnx.NodeProto:
    return next(node for node in graph.node if "logits" in node.output)


def reading(graph: onnx.GraphProto, name: str, shape: list[int | str]) -> None:
    """An input more, whose sum the hidden states are moved by."""
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    last = head(graph)
    total = add(graph, last, "ReduceSum", [name], f"{name}.sum", keepdims=0)
    last.input[0] = add(graph, last, "Add", [last.input[0], total], f"{name}.moved")


def encoder(graph: onnx.GraphProto) -> None:
    reading(graph, "encoder_hidden_states", ["batch", "source", 32])


def encoders_cache(graph: onnx.GraphProto) -> None:
    reading(graph, "past_key_values.0.encoder.key", ["batch", 2, "source", 8])


def cross(graph: onnx.GraphProto) -> None:
    """Keys that nothing is appended to, whatever they are called."""
    graph.input.append(helper.make_tensor_value_info("memory", TensorProto.FLOAT, ["batch", 2, "source", 8]))
    last = head(graph)
    total = add(graph, last, "ReduceSum", [add(graph, last, "Neg", ["memory"], "less")], "less.sum", keepdims=0)
    last.input[0] = add(graph, last, "Add", [last.input[0], total], "moved")


def state(name: str) -> Change:
    return lambda graph: reading(graph, name, ["batch", 32, 4])


def linear(graph: onnx.GraphProto) -> None:
    last = head(graph)
    last.input[0] = add(graph, last, "LinearAttention", [last.input[0]], "of_states", domain="com.microsoft")


def other_attention(graph: onnx.GraphProto) -> None:
    last = head(graph)
    last.input[0] = add(graph, last, "PagedAttention", [last.input[0]], "in_pages", domain="com.microsoft")


def unknown(graph: onnx.GraphProto) -> None:
    last = head(graph)
    last.input[0] = add(graph, last, "Softer", [last.input[0]], "softer", domain="com.example")


def concats(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """What appends keys, and values."""
    return [node for node in graph.node if node.op_type == "Concat" and node.input[0].startswith("past_key_values")]


def sliding(graph: onnx.GraphProto) -> None:
    for name, value in (("from", -100), ("to", 2**62), ("along", 2)):
        constant(graph, name, np.array([value]))
    for node in concats(graph):
        slides(graph, node)


def slides(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """What leaves is the last 100 slots."""
    present, whole = node.output[0], f"{node.output[0]}.whole"
    for reader in graph.node:
        reader.input[:] = [whole if name == present else name for name in reader.input]
    node.output[0] = whole
    add(graph, head(graph), "Slice", [whole, "from", "to", "along"], present)


def other_layout(graph: onnx.GraphProto) -> None:
    for node in concats(graph):
        rows_first(graph, node)
    del graph.value_info[:]


def rows_first(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Rows before heads: `[B,S,H,D]`."""
    past, present = node.input[0], node.output[0]
    turned = add(graph, node, "Transpose", [node.input[1]], f"{present}.turned", perm=[0, 2, 1, 3])
    back = f"{present}.back"
    for reader in graph.node:
        if reader is not node:
            reader.input[:] = [back if name == present else name for name in reader.input]
    node.input[1] = turned
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", 1))
    place = list(graph.node).index(node) + 1
    graph.node.insert(place, helper.make_node("Transpose", [present], [back], name=back, perm=[0, 2, 1, 3]))
    for values in (graph.input, graph.output):
        for value in values:
            if value.name in (past, present):
                value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, ["b", "slots", 2, 8]))


def one_for_two(graph: onnx.GraphProto) -> None:
    """Keys of two products are of one cache."""
    last = head(graph)
    softmax = next(node for node in graph.node if node.op_type == "Softmax")
    values = next(node for node in graph.node if node.op_type == "MatMul" and softmax.output[0] in node.input)
    again = add(graph, last, "MatMul", list(values.input), "again")
    total = add(graph, last, "ReduceSum", [again], "again.sum", keepdims=0)
    last.input[0] = add(graph, last, "Add", [last.input[0], total], "twice")


def bfloat16(graph: onnx.GraphProto) -> None:
    """As a host sees it; what lies behind is as it was."""
    for value in graph.input:
        if value.name.startswith("past_key_values"):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16


CASES: list[tuple[Change, str]] = [
    (encoder, "encoder_hidden_states: an encoder-decoder: cross attention's inputs"),
    (encoders_cache, "past_key_values.0.encoder.key: an encoder-decoder"),
    (cross, "memory: a cache that nothing is appended to: cross attention's"),
    (state("past_conv.0"), "past_conv.0: a state-space or linear attention state is no KV cache"),
    (state("past_ssm_states.0"), "past_ssm_states.0: a state-space or linear attention state"),
    (linear, "of_states.node: a state-space or linear attention state .*got LinearAttention"),
    (other_attention, "attention that keeps its cache in pages .*got com.microsoft::PagedAttention"),
    (unknown, "an operator of a custom domain .*got com.example::Softer"),
    (bfloat16, "past_key_values.0.key: a bfloat16 graph: ONNX Runtime's CPU does not run it"),
    (sliding, f"{KEY}: a cache that slides"),
    (other_layout, f"{KEY}: a cache in another layout .*appended to along axis 1"),
    (one_for_two, "past_key_values.0.key: two attentions share a cache"),
]


def changed(source: Path, place: Path, change: Change) -> Path:
    shutil.copytree(source.parent, place)
    model = onnx.load(source, load_external_data=False)
    change(model.graph)
    (place / source.name).write_bytes(model.SerializeToString())
    return place / source.name


@pytest.mark.parametrize(("change", "said"), CASES)
def test_refused_by_name(change: Change, said: str, torch_exported: TorchExported, tmp_path: Path):
    path = changed(torch_exported("llama"), tmp_path / "source", change)
    with pytest.raises(SemkvError, match=said):
        import_decoder(path, tmp_path)


def without_past(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Concat" and node.input[0].startswith("past_key_values"):
            node.input.pop(0)


def test_a_decoder_without_a_past_is_refused_and_lint_says_so(torch_exported: TorchExported, tmp_path: Path):
    path = changed(torch_exported("llama"), tmp_path / "source", without_past)
    with pytest.raises(SemkvError, match=r"a decoder without a past.*text-generation-with-past"):
        import_decoder(path, tmp_path)
    said = CliRunner().invoke(main, ["inspect", "--lint", str(path), "--target", "onnxruntime-cpu"])
    assert "no import: " in said.output and "without a past" in said.output.replace("\n", " ")


def test_external_data_that_is_not_there_is_named(torch_exported: TorchExported, tmp_path: Path):
    path = changed(torch_exported("llama"), tmp_path / "source", lambda graph: None)
    (path.parent / "model.onnx.data").unlink()
    said = CliRunner().invoke(main, ["build", str(path), "--budget", "0.5", "-o", str(tmp_path / "bundle")])
    assert said.exit_code and "model.onnx.data" in said.output.replace("\n", "")
    assert not (tmp_path / "bundle").exists()


def test_a_folder_given_for_its_graph_is_told_so(torch_exported: TorchExported, tmp_path: Path):
    folder = torch_exported("llama").parent
    said = CliRunner().invoke(main, ["build", str(folder), "--budget", "0.5", "-o", str(tmp_path / "bundle")])
    found = said.output.replace("\n", " ")
    assert said.exit_code and "a folder of ONNX graphs, and no checkpoint" in found and "model.onnx" in found


def test_configuration_and_tokenizer_of_another_folder(torch_exported: TorchExported, tmp_path: Path):
    """A graph and its weights alone are refused; `--config-from` says where the rest is."""
    exported = torch_exported("llama")
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in exported.parent.glob("*.onnx*"):
        shutil.copy(file, alone)

    def build(*options: object) -> Result:
        given = [alone / exported.name, "--budget", "1", "--method", "full", *options]
        return CliRunner().invoke(main, ["build", *map(str, given), "-o", str(tmp_path / "bundle")])

    refused = build()
    assert refused.exit_code and "--config-from" in refused.output, refused.output
    done = build("--config-from", exported.parent)
    assert done.exit_code == 0, done.output
    assert open_bundle(tmp_path / "bundle").manifest.model.family == "llama"


def test_a_source_that_has_a_configuration_takes_no_other(tiny_export: Path, tmp_path: Path):
    given = [tiny_export / "decoder.onnx", "--budget", "0.5", "--config-from", tmp_path, "-o", tmp_path / "bundle"]
    said = CliRunner().invoke(main, ["build", *map(str, given)])
    assert said.exit_code and "--config-from: the source has a configuration of its own" in said.output

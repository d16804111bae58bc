"""Attention in standard operators: recognised whatever its mask's spelling, proved, or refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from semkv_deploy.cli.main import main
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign import import_decoder
from semkv_deploy.export.foreign.masks import window_of

from .conftest import TorchExported

Change = Callable[[onnx.GraphProto], None]

FAMILIES = {
    "llama": {"windows": (0,), "heads": (4, 2, 8), "rotary": 4},
    "qwen2": {"windows": (5,), "heads": (4, 2, 8), "rotary": 4},
    "gemma2": {"windows": (6,), "heads": (4, 2, 16), "rotary": 8},
    "gpt2": {"windows": (0,), "heads": (4, 4, 8), "rotary": None},
}
OVERRIDES = {"qwen2": {"max_window_layers": 0}, "gpt2": {"num_key_value_heads": 4, "max_position_embeddings": 512}}


@pytest.mark.parametrize("name", FAMILIES)
def test_import_is_proved_against_the_original(name: str, torch_exported: TorchExported, tmp_path: Path):
    """Grouped heads, a window, a soft cap, positions that are embedded: proof raises where anything differs."""
    expected = FAMILIES[name]
    facts = import_decoder(torch_exported(name, **OVERRIDES.get(name, {})), tmp_path)
    assert (facts.query_heads, facts.kv_heads, facts.head_dim) == expected["heads"]
    assert facts.windows == expected["windows"]
    assert (facts.rotary and len(facts.rotary.inv_freq)) == expected["rotary"]
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("NexusAttention") == 1 and "Softmax" not in kinds
    assert {each.name for each in graph.input} & {"attention_mask"} == set()


def producer(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if name in node.output)


def softmax(graph: onnx.GraphProto) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == "Softmax")


def no_mask(graph: onnx.GraphProto) -> None:
    masked = producer(graph, softmax(graph).input[0])
    assert masked.op_type == "Add"
    product = next(name for name in masked.input if producer(graph, name).op_type in ("MatMul", "Mul", "Div"))
    softmax(graph).input[0] = product


def other_axis(graph: onnx.GraphProto) -> None:
    (axis,) = softmax(graph).attribute
    axis.i = 2


def sink(graph: onnx.GraphProto) -> None:
    """One logit more that nothing stands for, as in attention with sinks."""
    node = softmax(graph)
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 1, 0], np.int64), "pads"))
    graph.node.insert(
        list(graph.node).index(node), helper.make_node("Pad", [node.input[0], "pads"], ["padded"], name="sink")
    )
    node.input[0] = "padded"


def all_seen(graph: onnx.GraphProto) -> None:
    """A mask that hides nothing: of an encoder."""
    masked = producer(graph, softmax(graph).input[0])
    place = next(i for i, name in enumerate(masked.input) if producer(graph, name).op_type not in ("MatMul", "Mul"))
    node = helper.make_node("Mul", [masked.input[place], "none"], ["nothing"], name="nothing")
    graph.initializer.append(numpy_helper.from_array(np.float32(0), "none"))
    graph.node.insert(list(graph.node).index(masked), node)
    masked.input[place] = "nothing"


def of_another_domain(graph: onnx.GraphProto) -> None:
    softmax(graph).domain = "mine"


def one_cache(graph: onnx.GraphProto) -> None:
    """Keys and values of one cache."""
    node = next(node for node in graph.node if node.op_type == "Concat" and "past_key_values.0.value" in node.input)
    node.input[0] = "past_key_values.0.key"


def no_past(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Concat" and node.input[0].startswith("past_key_values"):
            node.input.pop(0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_mask, "a mask between the product of queries and keys and Softmax"),
        (other_axis, "Softmax over the last axis"),
        (sink, "a scale, a soft cap or one mask before Softmax, got Pad"),
        (all_seen, "a mask that .*that of a causal decoder"),
        (of_another_domain, "an operator of a custom domain"),
        (one_cache, "no attention that an importer knows|a cache of its own|cache whose attention"),
        (no_past, "a decoder without a past: it has no cache to compress"),
    ],
)
def test_what_is_not_known_is_refused(change: Change, said: str, torch_exported: TorchExported, tmp_path: Path):
    with pytest.raises(SemkvError, match=said):
        imported(torch_exported("llama"), tmp_path, change)


def test_lint_says_whether_a_graph_can_be_imported(torch_exported: TorchExported, tmp_path: Path):
    def said(path: Path) -> str:
        return CliRunner().invoke(main, ["inspect", "--lint", str(path), "--target", "onnxruntime-cpu"]).output

    source = torch_exported("llama")
    assert "build would import it: 1 x attention of MatMul and Softmax; positions: by position_ids" in said(source)
    model = onnx.load(source, load_external_data=False)
    no_mask(model.graph)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert "no import: " in said(tmp_path / "model.onnx") and "a mask between" in said(tmp_path / "model.onnx")


def imported(source: Path, place: Path, change: Change) -> Path:
    """The import of a changed graph; both lie in `place`."""
    shutil.copytree(source.parent, place / "source")
    (place / "out").mkdir()
    path = place / "source" / source.name
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    import_decoder(path, place / "out")
    return place / "out" / "decoder.onnx"


def causal(past: int, rows: int, window: int = 0) -> np.ndarray:
    distance = past + np.arange(rows)[:, None] - np.arange(past + rows)
    hidden = (distance < 0) | ((distance >= window) if window else False)
    return np.where(hidden, np.float32(-1e9), np.float32(0))[None, None]


@pytest.mark.parametrize(("past", "rows", "window"), [(0, 7, 0), (40, 1, 0), (40, 3, 8), (0, 12, 5), (8, 1, 8)])
def test_a_causal_mask_has_a_window_or_none(past: int, rows: int, window: int):
    assert window_of(causal(past, rows, window), past, rows) == window
    assert window_of(causal(past, rows, window=past + rows), past, rows) == 0, "too short to tell"


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.zeros((1, 1, 3, 5)), "is not causal"),
        (causal(2, 3) / 1e9, "has values that are neither"),
        (np.concatenate([causal(2, 3), causal(2, 3, window=2)]), "differs by row of the batch or by head"),
        (np.where(np.arange(5) == 2, -1e9, causal(2, 3)), "hides what no sliding window hides|is not causal"),
        (np.where(np.arange(5) == 1, -1e9, causal(2, 3)), "hides what no sliding window hides"),
        (causal(2, 4), "has the shape"),
        (np.zeros((1, 1, 3, 0)), "has the shape"),
    ],
)
def test_what_is_no_mask_of_a_causal_decoder(mask: np.ndarray, said: str):
    with pytest.raises(ValueError, match=said):
        window_of(mask.astype(np.float32), 2, 3)


def test_a_graph_that_counts_positions_itself_is_refused(torch_exported: TorchExported, tmp_path: Path):
    """By the length of its past: a compressed cache has another."""

    def change(graph: onnx.GraphProto) -> None:
        wide = helper.make_node("Shape", ["past_key_values.0.key"], ["past_shape"], name="past_shape", start=2, end=3)
        graph.node.insert(0, wide)
        graph.initializer.append(numpy_helper.from_array(np.int64(0), "at_zero"))
        graph.node.insert(1, helper.make_node("Add", ["position_ids", "past_shape"], ["counted"], name="count"))
        for node in list(graph.node)[2:]:
            node.input[:] = ["counted" if name == "position_ids" else name for name in node.input]

    with pytest.raises(SemkvError, match="counts positions by the length of its cache"):
        imported(torch_exported("llama"), tmp_path, change)


def test_the_rule_reads_the_graph_and_not_its_names(torch_exported: TorchExported, tmp_path: Path):
    def change(graph: onnx.GraphProto) -> None:
        renamed: dict[str, str] = {}
        for number, node in enumerate(graph.node):
            node.name = f"node.{number}"
            for output in node.output:
                if output not in {each.name for each in graph.output}:
                    renamed[output] = f"renamed.{len(renamed)}"
        for node in graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        del graph.value_info[:]

    model = ir.load(imported(torch_exported("llama"), tmp_path, change))
    assert sum(node.op_type == "NexusAttention" for node in model.graph) == 1

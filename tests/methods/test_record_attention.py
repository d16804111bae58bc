"""What a decoder writes down of its queries' attention, against softmax in PyTorch on the same queries and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.record_attention import record_attention
from semkv_deploy.passes.lower_gqa import lower_to_gqa

LAYERS, HEADS, DIM, ROWS, LIVE, CAPACITY = 2, 2, 16, 5, 10, 24


def run(
    export: Path, lowering: str, before: float, record: int = 1
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    import onnxruntime as ort

    model = ir.load(export / "decoder.onnx")
    queries = [node.inputs[0].name for node in model.graph if node.op_type == "NexusAttention"]
    record_attention(model)
    if lowering == "none":
        # The queries too, to compute the expected weights from.
        model.graph.outputs.extend(value for node in model.graph for value in node.outputs if value.name in queries)
    else:
        assert lower_to_gqa(model, bias="none") == LAYERS
    ir.external_data.load_to_model(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "input_ids": random.integers(2, 512, (1, ROWS)),
        "position_ids": np.arange(ROWS)[None] + 30,
        "logits_index": np.array([[ROWS - 1]]),
        "length": np.full((LAYERS, 1), LIVE),
        "record": np.array([record, 1]),
    }
    for layer in range(LAYERS):
        for name in ("key", "value"):
            feeds[f"past_key_values.{layer:02d}.{name}"] = random.standard_normal((1, HEADS, CAPACITY, DIM), np.float32)
        feeds[f"slot_attention.{layer:02d}"] = np.full((1, HEADS, CAPACITY), before, np.float32)
        feeds[f"slot_bias.{layer:02d}"] = np.zeros((1, HEADS, CAPACITY), np.float32)
    wanted = [value.name for value in session.get_outputs()]
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    return feeds, dict(zip(wanted, session.run(wanted, given), strict=True)), queries


@pytest.mark.parametrize("lowering", ["none", "gqa"])
@pytest.mark.parametrize("before", [0.0, 0.2])
def test_the_largest_weight_that_any_row_gives_a_slot_is_kept(lowering: str, before: float, tiny_export: Path):
    import torch

    feeds, outputs, queries = run(tiny_export, "none", before)
    found = outputs if lowering == "none" else run(tiny_export, lowering, before)[1]
    for layer in range(LAYERS):
        query = torch.from_numpy(outputs[queries[layer]])[0].reshape(HEADS, -1, DIM)
        keys = torch.from_numpy(feeds[f"past_key_values.{layer:02d}.key"])[0, :, :LIVE]
        weights = torch.softmax(query @ keys.mT * DIM**-0.5, -1).amax(1)
        expected = np.full((1, HEADS, CAPACITY), before, np.float32)
        expected[0, :, :LIVE] = np.maximum(expected[0, :, :LIVE], weights)
        # What the run itself appended, and dead slots, get no weight.
        np.testing.assert_allclose(found[f"slot_attention_out.{layer:02d}"], expected, atol=1e-4)


@pytest.mark.parametrize("lowering", ["none", "gqa"])
def test_a_run_that_is_not_recorded_raises_nothing(lowering: str, tiny_export: Path):
    recorded, silent = (run(tiny_export, lowering, 0.2, record)[1] for record in (1, 0))
    for layer in range(LAYERS):
        name = f"slot_attention_out.{layer:02d}"
        assert (silent[name] == np.float32(0.2)).all() and (recorded[name] != silent[name]).any()
    np.testing.assert_array_equal(recorded["logits"], silent["logits"])


def test_a_decoder_records_once(tiny_export: Path):
    model = ir.load(tiny_export / "decoder.onnx")
    record_attention(model)
    with pytest.raises(SemkvError, match="records attention already"):
        record_attention(model)


def test_a_graph_without_attention_is_refused():
    with pytest.raises(SemkvError, match="no semkv::NexusAttention"):
        record_attention(ir.Model(ir.Graph([], [], nodes=[], name="empty"), ir_version=10))

"""Attention cut into cache groups: the same logits and caches as one group a layer, through every lowering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from semkv_deploy.budget import budget_profile
from semkv_deploy.errors import SemkvError
from semkv_deploy.model.cache_groups import CacheGroup, GroupShare, by_layer, one_a_head, one_a_layer
from semkv_deploy.passes.lower_gqa import lower_to_gqa
from semkv_deploy.passes.lower_native import lower_to_native
from semkv_deploy.passes.split_groups import split_groups

LAYERS, HEADS, DIM, BATCH, ROWS, LIVE = 2, 2, 16, 2, 5, 10

GROUPS: dict[str, tuple[GroupShare, ...]] = {
    "by layer": by_layer([1.0, 2.0], HEADS),
    "by head": one_a_head(LAYERS, HEADS),
    "by head, of shares": tuple(
        GroupShare(layer=layer, heads=(head,), share=1 + layer + 0.5 * head)
        for layer in range(LAYERS)
        for head in range(HEADS)
    ),
    "heads out of order": (
        GroupShare(layer=0, heads=(1,)),
        GroupShare(layer=0, heads=(0,)),
        GroupShare(layer=1, heads=(0, 1)),
    ),
}


def groups_of(name: str) -> tuple[CacheGroup, ...]:
    return budget_profile(0.5, 1024, bytes_per_slot=1, groups=GROUPS[name]).groups


def run(export: Path, groups: tuple[CacheGroup, ...], lowering: str) -> dict[str, Any]:
    """Logits, and for every layer and head the key cache's first live and new slots."""
    import onnxruntime as ort

    model = ir.load(export / "decoder.onnx")
    if len(groups) != LAYERS or len({group.symbol for group in groups}) > 1:
        split_groups(model, groups)
    if lowering == "gqa":
        assert lower_to_gqa(model, bias="head") == len(groups)
    if lowering == "native":
        for key in [key for key in model.functions if key[0] == "semkv"]:
            del model.functions[key]
        lower_to_native(model, bias="head", dims={group.symbol: group.capacity for group in groups})
    ir.external_data.load_to_model(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    keys, values = random.standard_normal((2, LAYERS, BATCH, HEADS, 1024, DIM)).astype(np.float32)
    bias = random.standard_normal((LAYERS, BATCH, HEADS, 1024)).astype(np.float32)
    bias[..., LIVE:] = 0
    feeds: dict[str, Any] = {
        "input_ids": random.integers(2, 512, (BATCH, ROWS)),
        "position_ids": np.tile(np.arange(ROWS) + 30, (BATCH, 1)),
        "logits_index": np.full((BATCH, 1), ROWS - 1),
        "length": np.full((len(groups), BATCH), LIVE),
    }
    for number, group in enumerate(groups):
        for name, whole in (("past_key_values.{}.key", keys), ("past_key_values.{}.value", values)):
            feeds[name.format(f"{number:02d}")] = whole[group.layer][:, list(group.heads), : group.capacity].copy()
        feeds[f"slot_bias.{number:02d}"] = bias[group.layer][:, list(group.heads), : group.capacity].copy()
    shapes = {value.name: value.shape for value in session.get_inputs()}
    feeds = {
        name: array.reshape(-1, 1, *array.shape[2:]) if name.startswith("past") and shapes[name][1] == 1 else array
        for name, array in feeds.items()
    }
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, feeds), strict=True))
    found = {"logits": outputs["logits"]}
    for number, group in enumerate(groups):
        present = outputs[f"present.{number:02d}.key"].reshape(BATCH, len(group.heads), -1, DIM)
        for place, head in enumerate(group.heads):
            found[f"{group.layer}.{head}"] = present[:, place, : LIVE + ROWS]
    return found


@pytest.mark.parametrize("lowering", ["none", "gqa", "native"])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_layers_cut_apart(name: str, lowering: str, tiny_export: Path):
    whole = budget_profile(0.5, 1024, bytes_per_slot=1, groups=one_a_layer(LAYERS, HEADS)).groups
    expected = run(tiny_export, whole, "none")
    found = run(tiny_export, groups_of(name), lowering)
    assert found.keys() == expected.keys()
    for key, array in found.items():
        np.testing.assert_allclose(array, expected[key], atol=0 if lowering == "none" else 2e-4, err_msg=key)


def test_names_shapes_and_lengths_are_the_groups(tiny_export: Path):
    model = ir.load(tiny_export / "decoder.onnx")
    split_groups(model, groups_of("by head, of shares"))
    shapes = {value.name: [str(getattr(d, "value", d)) for d in value.shape or []] for value in model.graph.inputs}
    assert shapes["length"] == ["4", "batch"]
    assert [shapes[f"past_key_values.{n:02d}.key"][1:3] for n in range(4)] == [["1", f"capacity_{n}"] for n in range(4)]
    names = [node.name for node in model.graph if node.op_type == "NexusAttention"]
    assert names == [f"layers.{layer:02d}.group.{2 * layer + head}.attention" for layer in (0, 1) for head in (0, 1)]
    assert [value.name for value in model.graph.outputs][-2:] == ["present.03.key", "present.03.value"]


def test_groups_of_another_model_are_refused(tiny_export: Path):
    groups = budget_profile(0.5, 1024, bytes_per_slot=1, groups=one_a_layer(3, HEADS)).groups
    with pytest.raises(SemkvError, match=r"of other layers than the graph's \(expected layers 0 to 1"):
        split_groups(ir.load(tiny_export / "decoder.onnx"), groups)

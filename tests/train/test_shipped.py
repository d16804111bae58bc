"""Adapters that are shipped are those of the recipes beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from semkv_deploy.methods.sonic_adapter import fingerprint, load_adapter
from semkv_deploy.train.curves import read_log
from semkv_deploy.train.recipe import load_recipe

ADAPTERS = sorted((Path(__file__).parents[2] / "recipes").glob("*/adapter.safetensors"))


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.parent.name)
def test_adapter_is_of_its_recipe_and_in_its_log(path: Path):
    recipe_file = path.parent / "recipe.yaml"
    recipe = load_recipe(recipe_file, yaml.safe_load(recipe_file.read_text(encoding="utf-8")))
    adapter, shape = load_adapter(path), recipe.adapter
    assert path.stat().st_size <= 8e6
    assert (adapter.k_max, adapter.turns_max, adapter.rank) == (shape.k_max, shape.turns_max, shape.rank)
    assert {module for _, module in adapter.modules} == set(shape.modules) and adapter.corner == "causal"
    assert adapter.trained["recipe"] == recipe.name
    steps, held_out = read_log(path.parent / "log.jsonl")
    measured = {entry["step"]: sum(entry["held_out"].values()) / len(entry["held_out"]) for entry in held_out}
    assert measured[adapter.trained["steps"]] == min(measured.values())
    assert [entry["step"] for entry in steps] == list(range(1, len(steps) + 1))
    for entry in steps:
        assert recipe.stage_at(entry["step"] - 1)[0].name == entry["stage"]


def test_adapter_is_for_smollm2(smollm2_gguf: Path):
    """By its first embedding rows, read from the file without loading the model."""
    from gguf import GGUFReader, dequantize

    (table,) = [tensor for tensor in GGUFReader(smollm2_gguf).tensors if tensor.name == "token_embd.weight"]
    rows = dequantize(table.data[:1024], table.tensor_type)
    assert ADAPTERS and {load_adapter(path).base for path in ADAPTERS} == {fingerprint(rows)}

"""Recipes: which step is in which stage, learning rates, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from semkv_deploy.errors import SemkvError
from semkv_deploy.train.recipe import Stage, load_recipe
from semkv_deploy.train.schedule import rates
from tests.train.conftest import SMALL, small

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*/recipe.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_recipes_that_are_shipped(path: Path):
    recipe = load_recipe(path, yaml.safe_load(path.read_text(encoding="utf-8")))
    assert recipe.name == path.parent.name and recipe.adapter.corner == "causal"


def test_steps_are_counted_over_stages():
    recipe = small()
    assert recipe.steps == 5
    found = [(recipe.stage_at(step)[0].name, recipe.stage_at(step)[1]) for step in range(5)]
    assert found == [("embeddings", 0), ("embeddings", 1), ("adapter", 0), ("adapter", 1), ("adapter", 2)]
    with pytest.raises(IndexError):
        recipe.stage_at(5)


def stage(**changes: Any) -> Stage:
    values = {"name": "s", "steps": 8, "embeddings": 0.1, "adapter": 0.01, "warmup": 1, "losses": {"kd": 1}, **changes}
    return Stage.model_validate(values)


def test_rates_warm_up_then_stay_or_fall():
    assert rates(stage(), 0) == pytest.approx({"embeddings": 0.05, "lora_a": 0.005, "lora_b": 0.02})
    assert rates(stage(), 7)["embeddings"] == pytest.approx(0.1)
    assert [rates(stage(schedule="linear"), at)["embeddings"] for at in (1, 4, 7)] == pytest.approx(
        [0.0875, 0.05, 0.0125]
    )
    falling = [rates(stage(schedule="cosine"), at)["embeddings"] for at in range(1, 8)]
    assert falling == sorted(falling, reverse=True) and falling[3] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": []}, "r.yaml: stages: not a recipe: Tuple should have at least 1 item"),
        ({"steps": 3}, "r.yaml: steps: not a recipe: Extra inputs are not permitted"),
        ({"model": None}, "r.yaml: model: "),
        ({"kept": [0.5, 0.2]}, "kept: expected least ≤ most, got 0.5 and 0.2"),
        ({"kept": [0, 0.2]}, "r.yaml: kept.0: "),
        ({"adapter": {"corner": "round"}}, "adapter.corner: .*'causal' or 'full'"),
        ({"adapter": {"modules": ["lm_head"]}}, "adapter.modules.0"),
        ({"data": {"sources": []}}, "data.sources: "),
        ({"data": {"sources": [{"name": "austen"}], "turns": [1, 3]}}, "turns: expected 2 ≤ least ≤ most"),
        ({"stages": [{"name": "x", "steps": 1, "embeddings": 0.1, "losses": {}}]}, "all weights are 0: give one of kd"),
        ({"stages": [{"name": "x", "steps": 1, "embeddings": 0.1, "losses": {"rec": 1}}]}, "rec needs the Nexus rows"),
        (
            {"adapter": {"modules": []}, "stages": [{"name": "x", "steps": 1, "embeddings": 0, "losses": {"kd": 1}}]},
            "nothing is trained",
        ),
        ({"adapter": {"placement": "appended", "common": 5}}, "common says which tokens spread rows begin as"),
    ],
)
def test_what_is_wrong_with_a_recipe(changes: dict[str, Any], sentence: str):
    with pytest.raises(SemkvError, match=sentence):
        load_recipe(Path("r.yaml"), {**SMALL, **changes})


def test_a_recipe_is_a_mapping():
    with pytest.raises(SemkvError, match=r"r.yaml: not a recipe .expected a mapping with model, data and stages"):
        load_recipe(Path("r.yaml"), ["x"])

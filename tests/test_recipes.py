"""Every recipe, on a tiny model of its family: planned, lowered and linted as it would be for the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from semkv_deploy.bundle import Bundle
from semkv_deploy.cli import build, main
from semkv_deploy.errors import SemkvError
from semkv_deploy.recipe import load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
TARGETS = ("onnxruntime-cpu", "tensorrt", "tensorrt-rtx")

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "bos_token_id": 0,
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Any:
    """`decoder(family)`: an exported random model of one layer, with the tiny tokenizer."""
    import functools

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from semkv_deploy.export import export_model
    from semkv_deploy.methods import SemantiCache

    @functools.cache
    def export(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        extra = {"head_dim": 16} if family in ("gemma", "qwen3", "mistral", "llama") else {}
        extra |= {"num_key_value_heads": 4} if family == "phi" else {}
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(TINY | extra))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "checkpoint")
        AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder / "checkpoint")
        export_model(str(folder / "checkpoint"), folder / "export", SemantiCache())
        return folder / "export" / "decoder.onnx"

    return export


def test_every_family_has_a_recipe_for_every_target():
    found: dict[str, set[str]] = {}
    for path in RECIPES:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.stem == recipe["target"], "recipes/<model>/<target>.yaml"
        found.setdefault(recipe["family"], set()).add(recipe["target"])
    families = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi")
    assert found == {family: set(TARGETS) for family in families}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_plans_lowers_and_lints(path: Path, decoder: Any, tmp_path: Path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    source = str(decoder(recipe["family"]))
    budgets = [word for budget in recipe["budget"] for word in ("--budget", str(budget))]
    planned = CliRunner().invoke(
        main, ["plan", source, *budgets, "--max-context", "512", "--target", recipe["target"], "--json"]
    )
    assert planned.exit_code == 0, planned.output
    json.loads(planned.stdout)

    out = tmp_path / "bundle"
    shorter = ["--max-context", "512", "--budget", "0.25", "--weights", "fp32", "--no-engines", "-o", str(out)]
    built = CliRunner().invoke(main, ["build", source, "--recipe", str(path), *shorter])
    assert built.exit_code == 0, built.output
    manifest = Bundle.open(out).manifest
    assert list(manifest.targets) == [recipe["target"]]
    assert manifest.method.kind == recipe["method"]
    if recipe["target"] != "onnxruntime-cpu":
        record = manifest.targets[recipe["target"]]
        assert (record.dtype, record.layout) == (recipe["dtype"], recipe["layout"])
    linted = CliRunner().invoke(main, ["inspect", "--lint", str(out)])
    assert linted.exit_code == 0, linted.output


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1", "not a recipe (expected a mapping with family, source, budget, target, …)"),
        ("family: llama\nbudgets: [0.2]", "unknown key (expected family, "),
        ("family: llama\nmax-context: [1, 2]", "wrong kind of value (expected one value, got [1, 2])"),
        ("family: llama\nbudget: {", "not valid YAML: "),
    ],
)
def test_bad_recipes(text: str, message: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SemkvError) as error:
        load_recipe(path, build)
    assert message in str(error.value) and str(path) in str(error.value)


def test_recipe_for_another_family(decoder: Any, tmp_path: Path):
    path = ROOT / "recipes" / "qwen3-8b" / "tensorrt.yaml"
    out = tmp_path / "bundle"
    done = CliRunner().invoke(
        main, ["build", str(decoder("llama")), "--recipe", str(path), "--no-engines", "-o", str(out)]
    )
    assert done.exit_code == 1 and not out.exists()
    assert "the recipe is for another family of models (expected qwen3, got llama)" in done.output

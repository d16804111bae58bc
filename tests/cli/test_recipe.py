"""Every recipe: planned from the dimensions of its model, built and linted on a layer with that model's heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from semkv_deploy.budget_units import parse_budget
from semkv_deploy.bundle import Bundle, TensorRTRecord
from semkv_deploy.cli import main
from semkv_deploy.cli.build import build
from semkv_deploy.cli.plan import plan
from semkv_deploy.cli.recipe import load_recipe
from semkv_deploy.errors import SemkvError
from semkv_deploy.targets.tensorrt.api import missing

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.name != "recipe.yaml")
"""Those of `build`; what `train` takes is called recipe.yaml and tested in tests/train."""
TARGETS = ("onnxruntime-cpu", "tensorrt", "tensorrt-rtx")

# Published config.json of each model: what a plan needs, and what decides whether attention has a fused kernel.
MODELS: dict[str, dict[str, Any]] = {
    "gemma-2b": {
        "num_hidden_layers": 18,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "mistral-7b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "phi-2": {
        "num_hidden_layers": 32,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.4,
    },
    "qwen2.5-7b": {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    },
    "qwen3-8b": {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "smollm2-135m": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}

PARAMETERS = {
    "gemma-2b": 2.51e9,
    "llama-3.2-1b": 1.24e9,
    "mistral-7b": 7.25e9,
    "phi-2": 2.78e9,
    "qwen2.5-7b": 7.62e9,
    "qwen3-8b": 8.19e9,
    "smollm2-135m": 0.135e9,
}
"""As published: what is planned is the model that the recipe names."""


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def words(recipe: dict[str, Any], command: Any) -> list[str]:
    """The recipe's keys that a command takes, as its options."""
    taken = {option.removeprefix("--") for parameter in command.params for option in parameter.opts}
    found = []
    for key, value in recipe.items():
        if key in taken and key != "source":
            for item in value if isinstance(value, list) else [value]:
                found += [f"--{key}", str(item)]
    return found


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Any:
    """`decoder(model, family)`: one random layer with the model's head size, group and context, all else tiny."""
    import functools

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from semkv_deploy.export import export_model
    from semkv_deploy.methods import SemantiCache

    @functools.cache
    def export(model: str, family: str) -> Path:
        folder = tmp_path_factory.mktemp(model)
        real = MODELS[model]
        head_dim = real.get("head_dim") or real["hidden_size"] // real["num_attention_heads"]
        group = real["num_attention_heads"] // real["num_key_value_heads"]
        kv_heads = -(-4 // group)  # four query heads at least, as the kernels want
        tiny = {
            "num_hidden_layers": 1,
            "hidden_size": head_dim * group * kv_heads,
            "intermediate_size": 64,
            "num_attention_heads": group * kv_heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": 512,
            "eos_token_id": 1,
            "bos_token_id": 0,
        }
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(real | tiny))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "checkpoint")
        AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder / "checkpoint")
        export_model(str(folder / "checkpoint"), folder / "export", SemantiCache())
        return folder / "export" / "decoder.onnx"

    return export


def test_every_family_has_a_recipe_for_every_target():
    found: dict[str, set[str]] = {}
    for path in RECIPES:
        recipe = read(path)
        assert path.stem == recipe["target"], "recipes/<model>/<target>.yaml"
        found.setdefault(recipe["family"], set()).add(recipe["target"])
    families = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi")
    assert found == {family: set(TARGETS) for family in families}
    assert {path.parent.name for path in RECIPES} == set(MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_is_planned_for_its_model(path: Path, tmp_path: Path):
    """With every key of the recipe that `plan` takes, from the model's own config.json."""
    recipe, real = read(path), MODELS[path.parent.name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": recipe["family"], **real}))
    done = CliRunner().invoke(main, ["plan", str(tmp_path), *words(recipe, plan), "--json"])
    assert done.exit_code == 0, done.output
    planned = json.loads(done.stdout)
    assert planned["target"] == recipe["target"] and planned["method"] == recipe["method"]
    assert planned["max_context"] == recipe["max-context"] <= real["max_position_embeddings"]
    assert [row["budget"] for row in planned["rows"]] == recipe["budget"]
    if recipe["target"] == "onnxruntime-cpu":
        assert planned["stored_as"] == recipe["weights"]
        return
    assert (planned["stored_as"], planned["layout"]) == (recipe["dtype"], recipe["layout"])
    # In the dual layout, layers are there twice and the tied embedding once.
    once = 2 * PARAMETERS[path.parent.name]
    assert 0.98 * once < planned["rows"][0]["weight_bytes"] < 2.02 * once


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_builds_and_lints(path: Path, decoder: Any, tmp_path: Path):
    """Nothing of the recipe is overridden; engines are built where a runtime can build them here."""
    recipe = read(path)
    out, target = tmp_path / "bundle", recipe["target"]
    graphs_only = target != "onnxruntime-cpu" and (target == "tensorrt" or missing("tensorrt-rtx") is not None)
    options = ["--recipe", str(path), *(["--no-engines"] if graphs_only else []), "-o", str(out)]
    built = CliRunner().invoke(main, ["build", str(decoder(path.parent.name, recipe["family"])), *options])
    assert built.exit_code == 0, built.output
    manifest = Bundle.open(out).manifest
    assert list(manifest.targets) == [target] and manifest.max_context == recipe["max-context"]
    assert manifest.method.kind == recipe["method"]
    assert manifest.budgets == recipe["budget"]
    record = manifest.targets[target]
    if isinstance(record, TensorRTRecord):
        assert (record.dtype, record.layout) == (recipe["dtype"], recipe["layout"])
        if not graphs_only:
            assert record.compute_capabilities == [int(word) for word in recipe["compute-capability"].split(",")]
        for budget in record.budgets:
            # The model's heads have a fused kernel.
            assert budget.engines[0].layers == {"ATTENTION_INPUT": 1, "KV_CACHE_UPDATE": 2}
            assert (budget.contract.graphs[0].plan is None) == graphs_only
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


def test_recipe_with_budgets_in_slots_and_bytes(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("family: llama\nbudget: [0.2, 1638tokens, 64 MiB]")
    with click.Context(build) as context:
        context.default_map = load_recipe(path, build)
        (option,) = [parameter for parameter in build.params if parameter.name == "budgets"]
        budgets, _ = option.consume_value(context, {})
    assert [str(parse_budget(budget)) for budget in budgets] == ["0.2", "1638tokens", "64MiB"]


def test_recipe_for_another_family(decoder: Any, tmp_path: Path):
    path = ROOT / "recipes" / "qwen3-8b" / "tensorrt.yaml"
    out = tmp_path / "bundle"
    done = CliRunner().invoke(
        main, ["build", str(decoder("smollm2-135m", "llama")), "--recipe", str(path), "--no-engines", "-o", str(out)]
    )
    assert done.exit_code == 1 and not out.exists()
    assert "the recipe is for another family of models (expected qwen3, got llama)" in done.output

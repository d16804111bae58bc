"""`train`: SONIC's adapter for a model, from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semkv_deploy.cli.console import progress
from semkv_deploy.cli.options import PATH
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.train.recipe import Recipe

KEPT = (0.1, 0.2, 0.3, 0.5)
"""Kept shares that `--evaluate` measures; a model that keeps all is the table's `full`."""


@click.command()
@click.argument("recipe_file", metavar="RECIPE", type=PATH)
@click.option("-o", "--output", type=PATH, default=Path("sonic"), show_default=True, help="The run's folder.")
@click.option("--model", help="Checkpoint, instead of the recipe's.")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Checkpoint and leave after so many.")
@click.option("--fit", is_flag=True, help="Make stages longer or shorter, so that all end within --minutes.")
@click.option("--finish", is_flag=True, help="Take no steps: write the adapter and the curve of the run in the folder.")
@click.option("--evaluate", is_flag=True, help="Measure the adapter on held-out dialogues afterwards.")
@click.option(
    "--kept",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True),
    help=f"Kept share for --evaluate; may be given several times.  [default: {', '.join(map(str, KEPT))}]",
)
@click.option("--examples", type=click.IntRange(min=2), default=200, show_default=True, help="For --evaluate.")
def train(
    recipe_file: Path,
    output: Path,
    model: str | None,
    resume: bool,
    minutes: float | None,
    fit: bool,
    finish: bool,
    evaluate: bool,
    kept: tuple[float, ...],
    examples: int,
) -> None:
    """Trains SONIC's Nexus tokens for a model.

    RECIPE is a YAML file that names model, data, budgets, losses and stages, such as those in recipes/*-sonic. The
    folder gets adapter.safetensors (what `build --method sonic` takes), log.jsonl, curve.png and a checkpoint that
    --resume goes on from; stages may be longer then. One GPU is used where there is one, several with
    `accelerate launch -m semkv_deploy.cli train …`.

    \b
    semkv-deploy train recipes/smollm2-135m-sonic/recipe.yaml --model SmolLM2-135M-Instruct.Q4_1.gguf -o sonic/
    semkv-deploy train recipes/smollm2-135m-sonic/recipe.yaml -o sonic/ --resume --evaluate
    """
    from semkv_deploy.cli.yaml_values import parse
    from semkv_deploy.runtime.tokens import decoded_text
    from semkv_deploy.train.recipe import load_recipe

    if fit and (not minutes or resume or finish):
        raise SemkvError("--fit goes with --minutes, for a run that begins", fix="give --minutes, or leave --fit out")
    if not recipe_file.is_file():
        raise SemkvError("no such file", where=recipe_file, expected="a recipe, such as those in recipes/*-sonic")
    text = decoded_text(recipe_file.read_bytes(), str(recipe_file))
    recipe: Recipe = load_recipe(recipe_file, parse(text, recipe_file))
    from semkv_deploy.train.session import run  # PyTorch and all: a wrong recipe is refused before it is imported

    with progress() as report:
        done = run(
            recipe, output, report, model=model, resume=resume or finish, minutes=minutes, fit=fit,
            steps=not finish,
            evaluation=None if not evaluate else (kept or KEPT, examples),
        )  # fmt: skip
    for line in _lines(done):
        click.echo(line)


def _lines(done: dict[str, Any]) -> list[str]:
    """What a run has come to; nothing in processes that are not the main one."""
    if not done:
        return []
    lines = [f"{done['steps']} of {done['of']} steps, {done['tokens']} tokens; adapter of step {done['adapter_step']}"]
    lines.append(f"wrote {', '.join(done['files'])} in {done['folder']}")
    if done["steps"] < done["of"]:
        lines.append("not finished: go on with --resume")
    return [*lines, *(["", done["table"]] if done.get("table") else [])]

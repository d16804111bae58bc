"""What `semkv-deploy train` does: trains, or goes on, then writes adapter, curve and, where asked for, a table."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from semkv_deploy.export.checkpoint import load_checkpoint
from semkv_deploy.methods.sonic_adapter import load_adapter
from semkv_deploy.train.curves import draw
from semkv_deploy.train.evaluate import evaluate, markdown, write
from semkv_deploy.train.loop import BEST, LOG, Training

if TYPE_CHECKING:
    from semkv_deploy.train.recipe import Recipe

ADAPTER, CURVE = "adapter.safetensors", "curve.png"


def run(
    recipe: Recipe,
    out: Path,
    report: Callable[[str, float | None], None],
    *,
    model: str | None = None,
    resume: bool = False,
    minutes: float | None = None,
    fit: bool = False,
    steps: bool = True,
    evaluation: tuple[Sequence[float], int] | None = None,
) -> dict[str, Any]:
    """Trains in a folder; returns what a user is told, nothing in processes that are not the main one.

    The adapter is the run's best by KL on held-out dialogues, not its last.

    Args:
        model: a checkpoint instead of the recipe's.
        minutes: after which the run is left.
        fit: makes stages longer or shorter, so that all end within `minutes`.
        steps: False: take none, write what the folder's run has come to.
        evaluation: kept shares and number of dialogues to measure afterwards.
    """
    report("loading the model", None)
    training = Training(recipe, load_checkpoint(model or recipe.model), out, resume=resume, report=report)
    if fit and minutes is not None:
        training.fit(minutes)
        minutes *= 1.1  # a run that turns out slower is not cut short in its last steps
    if steps:
        training.run(minutes=minutes)
    if not training.accelerator.is_main_process:
        return {}
    shutil.copyfile(out / BEST, out / f"{ADAPTER}.part")
    (out / f"{ADAPTER}.part").replace(out / ADAPTER)
    adapter = load_adapter(out / ADAPTER)
    files = [ADAPTER, LOG]
    if find_spec("matplotlib") is not None:
        draw(out / LOG, out / CURVE, f"{recipe.name}: {training.step} steps, {training.tokens} tokens")
        files.append(CURVE)
    done = {"steps": training.step, "of": training.recipe.steps, "tokens": training.tokens, "files": files,
            "folder": str(out), "adapter_step": adapter.trained["steps"]}  # fmt: skip
    if evaluation is not None:
        kept, examples = evaluation
        objective = training.objective_alone
        objective.student.cast(torch.float32)  # what is measured is, whatever was trained beside
        objective.student.take(adapter, out / ADAPTER)
        table = evaluate(objective, training.dialogues, recipe, training.accelerator.device, kept=kept,
                         examples=examples, report=report)  # fmt: skip
        write({"recipe": recipe.name, "trained": dict(adapter.trained), **table}, out)
        done["files"] += ["evaluation.json", "evaluation.md"]
        done["table"] = markdown(table)
    return done

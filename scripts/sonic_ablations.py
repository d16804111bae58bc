"""What each part of SONIC's training is worth: `sonic_ablations.py RECIPE MODEL OUT`.

Short runs from the recipe, each with one thing other than the first, `all`: every loss off in turn, embeddings alone,
one budget instead of many, another corner, rows that begin as any token of their turn, and rows behind it. All runs
take the same dialogues and steps in the same order. After each, held-out dialogues of all of the recipe's sources are
measured at 20 and 50 % kept: KL to the full cache over the tokens after the first turn, in nats, the share of facts
recalled where they ask for some, and each difference from `all`, paired by dialogue, with its 95 % bootstrap interval.
OUT gets ablations.json and ablations.md; what is there already of the same settings is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from semkv_deploy.evaluate.metrics import estimate, paired
from semkv_deploy.export.checkpoint import load_checkpoint
from semkv_deploy.train.evaluate import FULL, OURS, held_out, later_rows, measure
from semkv_deploy.train.loop import Training
from semkv_deploy.train.recipe import Recipe, load_recipe

Values = dict[str, Any]
KEPT = (0.2, 0.5)
LOSSES = {"kd": 1.0, "ce": 0.1, "attn": 0.1, "rec": 0.05, "reg": 0.1}
"""Of the second stage; the first has `match`."""


def off(loss: str) -> Callable[[Values], None]:
    """The loss is weighed with 0; where a stage has no other, it has those of the second."""

    def change(recipe: Values) -> None:
        for stage in recipe["stages"]:
            stage["losses"] = {name: weight for name, weight in stage["losses"].items() if name != loss} or dict(LOSSES)

    return change


def adapter(**fields: Any) -> Callable[[Values], None]:
    return lambda recipe: recipe["adapter"].update(fields)


def kept(share: float) -> Callable[[Values], None]:
    return lambda recipe: recipe.update(kept=[share, share])


VARIANTS: dict[str, Callable[[Values], None]] = {
    "all": lambda recipe: None,
    **{f"without {loss}": off(loss) for loss in ("match", *LOSSES)},
    "match alone": lambda recipe: recipe["stages"][1].update(losses={"match": 1.0}),
    "embeddings alone": adapter(modules=[]),
    "20 % only": kept(0.2),
    "corner full": adapter(corner="full"),
    "any token": adapter(common=0),
    "appended": adapter(placement="appended", common=0),
}


def variant(path: Path, name: str, steps: int, tokens: int) -> Recipe:
    """The recipe with two stages of the given steps, and what the variant changes."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    first, second = (copy.deepcopy(stage) for stage in values["stages"][:2])
    values["stages"] = [
        {**first, "steps": steps // 3, "warmup": 5, "losses": {"match": 1.0}},
        {**second, "steps": steps - steps // 3, "warmup": 5, "schedule": "linear", "losses": dict(LOSSES)},
    ]
    values["data"]["tokens"] = tokens
    values["checkpoint_every"] = 1 << 20  # nothing is measured on the way
    VARIANTS[name](values)
    return load_recipe(path, values)


@torch.no_grad()
def measured(training: Training, examples: int) -> dict[str, list[dict[str, float]]]:
    """By kept share, of every dialogue its KL, nll and, where it asks for facts, recall."""
    objective, recipe = training.objective_alone, training.recipe
    objective.student.cast(torch.float32)
    found: dict[str, list[dict[str, float]]] = {f"{share:g}": [] for share in KEPT}
    names = training.dialogues.names
    with objective.student.attending():
        for number in range(examples):
            teacher = None
            for share in KEPT:
                source = names[number % len(names)]
                batch = held_out(training.dialogues, number, share, recipe.adapter, source)
                rows = later_rows(batch)
                teacher = objective.teacher_logits(batch, rows)[0] if teacher is None else teacher
                logits = {FULL: teacher, OURS: objective.student_logits(batch, rows)[0]}
                found[f"{share:g}"].append(measure(logits, batch, rows)[OURS])
    return found


def table(runs: dict[str, Values], steps: int, examples: int) -> str:
    """A row for each variant; differences are from `all`."""
    lines = [
        f"Runs of {steps} steps, {examples} held-out dialogues. Differences from `all` with 95 % intervals; above 0,",
        "what is missing was worth it.",
        "",
        "| variant | KL 20 % | difference | KL 50 % | difference | recall 20 % | recall 50 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        cells = []
        for share in run["held_out"]:
            values = [each["kl"] for each in run["held_out"][share]]
            others = [each["kl"] for each in runs["all"]["held_out"][share]]
            mean, low, high = paired(values, others)
            cells += [f"{estimate(values).mean:.3f}", "" if name == "all" else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"]
        for share in run["held_out"]:
            recalled = [each["recall"] for each in run["held_out"][share] if "recall" in each]
            cells.append(f"{sum(recalled) / len(recalled):.2f}" if recalled else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model", help="a checkpoint instead of the recipe's")
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--steps", type=int, default=120, help="of a run, a third of them `match` [120]")
    parser.add_argument("--tokens", type=int, default=256, help="of a dialogue at most [256]")
    parser.add_argument("--examples", type=int, default=30, help="held-out dialogues [30]")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="these only, and `all` [every one]")
    options = parser.parse_args()
    asked = {"steps": options.steps, "tokens": options.tokens, "examples": options.examples}
    path = options.out / "ablations.json"
    done: Values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs: dict[str, Values] = done["runs"] if {name: done.get(name) for name in asked} == asked else {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in VARIANTS:
        if name in runs or (options.variant and name not in ("all", *options.variant)):
            continue
        recipe = variant(options.recipe, name, options.steps, options.tokens)
        with tempfile.TemporaryDirectory() as folder:
            training = Training(recipe, load_checkpoint(options.model), Path(folder), resume=False,
                                report=lambda what, share: None)  # fmt: skip
            training.run()
            run = {"recipe": recipe.model_dump(mode="json"), "tokens": training.tokens,
                   "seconds": round(training.seconds), "held_out": measured(training, options.examples)}  # fmt: skip
        runs[name] = run
        path.write_text(json.dumps({**asked, "runs": runs}) + "\n", encoding="utf-8")
        text = table(runs, options.steps, options.examples)
        (options.out / "ablations.md").write_text(text, encoding="utf-8")
        print(f"{name}: {run['seconds']} s, {run['tokens']} tokens", flush=True)
    print(table(runs, options.steps, options.examples))


if __name__ == "__main__":
    main()

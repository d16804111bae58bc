"""What training is worth: KL and recall on held-out dialogues, against other ways to spend as many slots.

Everything is measured with masks, in PyTorch, in one run, and every way keeps X and the open turn: `nexus` has Nexus
rows for what came before, `streaming-llm` as many of the newest tokens, `h2o` as many tokens in each KV head, `dropped`
nothing, `full` everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from semkv_deploy.evaluate.metrics import estimate, paired
from semkv_deploy.train import losses
from semkv_deploy.train.data import MADE
from semkv_deploy.train.heavy_hitters import heavy_hitters
from semkv_deploy.train.layout import PAD, Batch, batch_of, causal, counts_for, window
from semkv_deploy.train.objective import Look, contiguous, masked

if TYPE_CHECKING:
    from semkv_deploy.train.data import Dialogues
    from semkv_deploy.train.objective import Objective
    from semkv_deploy.train.recipe import AdapterShape, Recipe

QUICK, QUICK_KEPT = 6, (0.2, 0.5)
"""Dialogues and kept shares of the measurement that goes with a checkpoint."""

OURS, STREAM, HEAVY, DROPPED, FULL = "nexus", "streaming-llm", "h2o", "dropped", "full"
WAYS = (OURS, STREAM, HEAVY, DROPPED, FULL)

Report = Callable[[str, float | None], None]
Example = dict[str, dict[str, float]]
"""Of one dialogue, by way to spend slots: `kl`, `nll`, and `recall` where it asks for facts."""


def held_out(dialogues: Dialogues, number: int, kept: float, shape: AdapterShape, source: str | None = None) -> Batch:
    """One held-out dialogue at a kept share."""
    dialogue = dialogues.dialogue("held-out", number, source)
    counts = counts_for([len(turn) for turn in dialogue.turns[:-1]], kept, shape.k_max)
    return batch_of([dialogue], [counts], shape.placement, dialogues.rank(shape.common))


def later_rows(batch: Batch) -> Tensor:
    """Rows of one dialogue that predict something after its first turn."""
    return torch.nonzero((batch.turn[0] > 0) & (batch.target[0] >= 0))[:, 0]


@torch.no_grad()
def quick_kl(objective: Objective, dialogues: Dialogues, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Mean KL of the turns after the first, by kept share: the same few dialogues every time."""
    values: dict[str, list[float]] = {f"{kept:g}": [] for kept in QUICK_KEPT}
    with objective.student.attending():
        for number in range(QUICK):
            teacher: Tensor | None = None
            for kept in QUICK_KEPT:
                batch = held_out(dialogues, number, kept, recipe.adapter).to(device)
                rows = later_rows(batch)
                # The teacher sees text alone: the same at every kept share.
                teacher = objective.teacher_logits(batch, rows)[0] if teacher is None else teacher
                student = objective.student_logits(batch, rows)[0]
                values[f"{kept:g}"].append(losses.kd(teacher, student, torch.ones(len(rows), device=device)).item())
    return {kept: round(sum(of) / len(of), 4) for kept, of in values.items()}


def full_logits(objective: Objective, batch: Batch, rows: Tensor) -> tuple[dict[str, Tensor], dict[int, Look]]:
    """Logits `[n,V]` of one dialogue's rows where no budget plays a part: with everything, and with nothing earlier.

    Returns:
        these by way, and what the layers of the full cache worked on.
    """
    run, looks = objective.student.run, dict[int, Look]()
    # Without Nexus rows it is the teacher's.
    full = run(masked(causal(batch), looks), contiguous(batch), ids=batch.ids, head=rows)[0]
    dropped = masked(window(batch, history=False))
    return {FULL: full, DROPPED: run(dropped, contiguous(batch), ids=batch.ids, head=rows)[0]}, looks


def kept_logits(objective: Objective, batch: Batch, rows: Tensor, looks: dict[int, Look]) -> dict[str, Tensor]:
    """Logits `[n,V]` of one dialogue's rows, by way to spend as many slots as it has Nexus rows.

    Args:
        looks: what the layers of the full cache worked on.
    """
    others = {STREAM: masked(window(batch)), HEAVY: heavy_hitters(batch, looks)}
    run = objective.student.run
    return {
        OURS: objective.student_logits(batch, rows)[0],
        **{name: run(attend, contiguous(batch), ids=batch.ids, head=rows)[0] for name, attend in others.items()},
    }


def measure(logits: dict[str, Tensor], batch: Batch, rows: Tensor) -> Example:
    """One dialogue's numbers.

    Recall counts answers all of whose tokens are the most likely ones, given the answer's tokens before.
    """
    target, answer = batch.target[0, rows], batch.answer[0, rows]
    ones = torch.ones(len(rows), device=rows.device)
    asked = sorted(set(answer.tolist()) - {0})
    result: Example = {}
    for name, of in logits.items():
        result[name] = {
            "kl": losses.kd(logits[FULL], of, ones).item(),
            "nll": losses.ce(of, target, ones).item(),
        }
        if asked:
            right = of.argmax(-1) == target
            result[name]["recall"] = sum(bool(right[answer == number].all()) for number in asked) / len(asked)
    return result


@torch.no_grad()
def evaluate(
    objective: Objective,
    dialogues: Dialogues,
    recipe: Recipe,
    device: torch.device,
    *,
    kept: Sequence[float],
    examples: int,
    report: Report = lambda what, share: None,
) -> dict[str, Any]:
    """Measures `examples` dialogues of each task at each kept share.

    Tasks are `text`, dialogues of the recipe's sources that are not made from templates, and `recall`, where the recipe
    has it.
    """
    sources = [source for source in recipe.data.sources if source.name not in MADE]
    tasks: dict[str, Callable[[int], str]] = {}
    if sources:
        tasks["text"] = lambda number: sources[number % len(sources)].name
    if "recall" in dialogues.names:
        tasks["recall"] = lambda number: "recall"
    table = []
    for task, source in tasks.items():
        measured: dict[float, list[Example]] = {share: [] for share in kept}
        used: dict[float, list[tuple[int, int]]] = {share: [] for share in kept}
        for number in range(examples):
            full: tuple[dict[str, Tensor], dict[int, Look]] | None = None
            for share in kept:
                batch = held_out(dialogues, number, share, recipe.adapter, source(number)).to(device)
                rows = later_rows(batch)
                with objective.student.attending():
                    # The text is the same at every share.
                    full = full or full_logits(objective, batch, rows)
                    logits = {**full[0], **kept_logits(objective, batch, rows, full[1])}
                measured[share].append(measure(logits, batch, rows))
                used[share].append((int((batch.nexus_turn != PAD).sum()), _finished(batch)))
            report(f"evaluating {task}", (number + 1) / examples)
        table += [{"task": task, "kept": share, **_summary(measured[share], used[share])} for share in kept]
    return {"examples": examples, "seed": recipe.seed, "rows": table}


def _finished(batch: Batch) -> int:
    """Tokens of finished turns of one dialogue."""
    return int(((batch.turn >= 0) & (batch.turn < batch.turn.max())).sum())


def _summary(measured: list[Example], used: list[tuple[int, int]]) -> dict[str, Any]:
    """Means with intervals by way to spend slots, and paired differences of ours from the others."""
    slots = sum(count for count, _ in used) / sum(tokens for _, tokens in used)
    result: dict[str, Any] = {"slots_per_token": round(slots, 4), "methods": {}, "nexus_minus": {}}
    for metric in ("kl", "nll", "recall"):
        having = [each for each in measured if metric in each[OURS]]
        if not having:
            continue
        for name in WAYS:
            values = [each[name][metric] for each in having]
            result["methods"].setdefault(name, {})[metric] = _rounded(estimate(values))
            if name != OURS:
                ours = [each[OURS][metric] for each in having]
                result["nexus_minus"].setdefault(name, {})[metric] = _rounded(paired(ours, values))
    return result


def _rounded(values: Sequence[float]) -> list[float]:
    """Mean, low, high."""
    return [round(value, 4) for value in values]


def markdown(table: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{table['examples']} held-out dialogues a row, seed {table['seed']}; means over dialogues with 95 % bootstrap",
        "intervals. KL and nll in nats over all tokens after the first turn, recall by raw completion. All ways keep",
        "the beginning and the open turn; Nexus rows, StreamingLLM and H2O have equally many slots.",
        "",
        "| task | kept | slots per token | way | KL from the full cache | nll | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        for name, metrics in row["methods"].items():
            cells = [_cell(metrics.get(metric)) for metric in ("kl", "nll", "recall")]
            lines.append(
                f"| {row['task']} | {row['kept']:.0%} | {row['slots_per_token']} | {name} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def write(table: dict[str, Any], folder: Path) -> None:
    """Writes `evaluation.json` and `evaluation.md`."""
    (folder / "evaluation.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(markdown(table), encoding="utf-8")

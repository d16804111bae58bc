"""What training is worth: KL and recall on held-out dialogues, against other ways to spend as many slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from semkv_deploy.train import losses
from semkv_deploy.train.layout import Batch, batch_of, counts_for

if TYPE_CHECKING:
    from semkv_deploy.train.data import Dialogues
    from semkv_deploy.train.objective import Objective
    from semkv_deploy.train.recipe import Recipe

QUICK, QUICK_KEPT = 8, (0.2, 0.5)
"""Dialogues and kept shares of the measurement that goes with a checkpoint."""


def held_out(dialogues: Dialogues, number: int, kept: float, k_max: int, source: str | None = None) -> Batch:
    """One held-out dialogue at a kept share."""
    dialogue = dialogues.dialogue("held-out", number, source)
    return batch_of([dialogue], [counts_for([len(turn) for turn in dialogue.turns[:-1]], kept, k_max)])


@torch.no_grad()
def quick_kl(objective: Objective, dialogues: Dialogues, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Mean KL of the turns after the first, by kept share: the same few dialogues every time."""
    found = {}
    with objective.student.attending():
        for kept in QUICK_KEPT:
            values = []
            for number in range(QUICK):
                batch = held_out(dialogues, number, kept, recipe.adapter.k_max).to(device)
                rows = torch.nonzero((batch.turn[0] > 0) & (batch.target[0] >= 0))[:, 0]
                teacher, student = objective.teacher_logits(batch, rows)[0], objective.student_logits(batch, rows)[0]
                values.append(losses.kd(teacher, student, torch.ones(len(rows), device=device)).item())
            found[f"{kept:g}"] = round(sum(values) / len(values), 4)
    return found

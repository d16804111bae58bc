"""Learning rates of a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semkv_deploy.train.recipe import Stage


def rates(stage: Stage, step: int) -> dict[str, float]:
    """Learning rates of `embeddings`, `lora_a` and `lora_b` in a stage's step, counted from 0."""
    scale = min(1.0, (step + 1) / (stage.warmup + 1))
    left = 1 - step / stage.steps
    if stage.schedule == "linear":
        scale *= left
    elif stage.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return {
        "embeddings": scale * stage.embeddings,
        "lora_a": scale * stage.adapter,
        "lora_b": scale * stage.adapter * stage.lora_b_ratio,
    }

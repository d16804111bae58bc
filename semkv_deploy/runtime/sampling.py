"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampler:
    """Greedy by default; with a temperature, draws from the smallest set of tokens whose probability reaches `top_p`.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass, 0 < top_p <= 1.
        seed: of the draws; rows draw in order, so a batch is reproducible as a whole.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise SemkvError("out of range", where="--temperature", expected="0 or more", got=self.temperature)
        if not 0 < self.top_p <= 1:
            raise SemkvError("out of range", where="--top-p", expected="0 < top-p <= 1", got=self.top_p)
        object.__setattr__(self, "_random", np.random.default_rng(self.seed))

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """`[B]` token ids from `[B,V]` logits; ties go to the lowest id."""
        if self.temperature == 0:
            return logits.argmax(-1).astype(np.int64)
        return np.array([self._draw(row) for row in logits], np.int64)

    def _draw(self, logits: NDArray[np.float32]) -> int:
        scaled = (logits - logits.max()).astype(np.float64) / self.temperature
        probability = np.exp(scaled)
        probability /= probability.sum()
        order = np.argsort(-probability, kind="stable")
        mass = np.cumsum(probability[order])
        # The token that crosses top_p belongs to the nucleus.
        nucleus = order[: int(np.searchsorted(mass, self.top_p)) + 1]
        chosen = probability[nucleus] / probability[nucleus].sum()
        random: np.random.Generator = self._random  # type: ignore[attr-defined]
        return int(random.choice(nucleus, p=chosen))

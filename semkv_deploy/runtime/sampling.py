"""Choosing the next token from logits."""

from __future__ import annotations

import math
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
        top_k: draw from so many likeliest tokens at most; 0: from all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise SemkvError("out of range", where="--temperature", expected="0 or more", got=self.temperature)
        if not 0 < self.top_p <= 1:
            raise SemkvError("out of range", where="--top-p", expected="0 < top-p <= 1", got=self.top_p)
        if self.top_k < 0:
            raise SemkvError("out of range", where="--top-k", expected="0 (all) or more", got=self.top_k)
        if not 0 <= self.seed < 1 << 64:
            raise SemkvError("out of range", where="--seed", expected="0 to 2^64 - 1", got=self.seed)
        object.__setattr__(self, "_random", np.random.default_rng(self.seed))

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """`[B]` token ids from `[B,V]` logits; ties go to the lowest id.

        Raises:
            SemkvError: when a row's logits hold NaN or infinity.
        """
        # The largest carries NaN along.
        if not np.isfinite(logits.max(-1)).all():
            raise SemkvError(
                "the model's logits are not finite numbers",
                where="sampling",
                fix="validate the bundle, or build it with other --weights or --dtype",
            )
        if self.temperature == 0:
            return logits.argmax(-1).astype(np.int64)
        return np.array([self._draw(row) for row in logits], np.int64)

    def _draw(self, logits: NDArray[np.float32]) -> int:
        # A temperature near 0 sends all but the likeliest to minus infinity, which is what it means.
        with np.errstate(over="ignore"):
            scaled = (logits.astype(np.float64) - float(logits.max())) / self.temperature
        order = np.argsort(-scaled, kind="stable")[: self.top_k or None]
        probability = np.zeros(len(scaled))
        probability[order] = np.exp(scaled[order])
        probability /= probability.sum()
        mass = np.cumsum(probability[order])
        # The token that crosses top_p belongs to the nucleus.
        nucleus = order[: int(np.searchsorted(mass, self.top_p)) + 1]
        chosen = probability[nucleus] / probability[nucleus].sum()
        random: np.random.Generator = self._random  # type: ignore[attr-defined]
        return int(random.choice(nucleus, p=chosen))

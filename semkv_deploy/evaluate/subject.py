"""What is measured: a model whose cache was compressed before anything is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Kept(NamedTuple):
    """What a cache holds when the question comes.

    Attributes:
        bytes: of live keys, values and biases.
        share: of the bytes that the full cache of the same tokens has.
    """

    bytes: int
    share: float


class Subject(Protocol):
    """One method at one budget, ready to read."""

    backend: str
    """What computes its attention."""

    def read(self, turns: Sequence[Sequence[int]]) -> Kept:
        """Starts over, reads the turns, and compresses: what is asked later is not known yet."""

    def follow(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits `[n,V]` after each of the ids, appended to what was read and to nothing else."""

    def generate(self, ids: Sequence[int], count: int, *, stop: bool = True) -> list[int]:
        """Greedy tokens after the ids, which are appended to what was read and to nothing else.

        Args:
            count: tokens at most; exactly, without `stop`.
            stop: end where the model ends its reply.
        """

    def close(self) -> None:
        """Gives back memory."""

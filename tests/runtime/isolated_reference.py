"""Which tokens `streaming-llm:turns=isolated` keeps, as lists of positions: slow, obvious, and from the docs alone."""

from __future__ import annotations

import math


class Statement:
    """One row of one cache group.

    Attributes:
        older: positions that finished turns kept.
        open: positions that the open turn has left.
    """

    def __init__(self, capacity: int, keep: int, share: float, piece: int, sinks: int = 4) -> None:
        self.capacity, self.keep, self.share, self.piece, self.sinks = capacity, keep, share, piece, sinks
        self.older: list[int] = []
        self.open: list[int] = []
        self.position = self.begun = self.pinned = 0
        self.ended = False

    @property
    def kept(self) -> list[int]:
        return self.older + self.open

    def append(self, count: int) -> None:
        """A prompt, or a step of one token."""
        self.begin()
        for start in range(0, count, self.piece):
            self._append(min(self.piece, count - start))

    def begin(self) -> None:
        """What is left of the last turn's end is done."""
        if self.ended:
            self._finish()

    def _append(self, count: int) -> None:
        if len(self.kept) + count > self.capacity:
            self._fit(len(self.open))
        self.open += range(self.position, self.position + count)
        self.position += count

    def end(self, at_once: bool = False) -> None:
        self.ended = self.ended or self.position > self.begun
        if at_once:
            self.begin()

    def pin(self) -> None:
        self.older, self.open = self.kept, []
        self.pinned, self.begun, self.ended = len(self.older), self.position, False

    def _finish(self) -> None:
        """The turn keeps its share of its tokens, sinks and one more if it is the first; then it is frozen."""
        own = max(math.ceil(self.share * (self.position - self.begun)), self.sinks + 1 - len(self.older))
        self._fit(own)
        self.older, self.open = self.kept, []
        self.begun, self.ended = self.position, False

    def _fit(self, own: int) -> None:
        """The open turn loses its oldest tokens; where older turns have more than half, they lose theirs."""
        own = min(own, max(self.keep - len(self.older), self.keep // 2))
        while len(self.open) > own:
            self.open.remove(next(at for at in self.open if at >= self.sinks))
        while len(self.kept) > self.keep:
            del self.older[max(self.pinned, self.sinks)]

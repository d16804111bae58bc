"""What a task is: examples made from a seed, and what is measured on each.

An example is turns to read and something to ask. The cache is compressed between the two, so no method knows the
question when it chooses what to keep.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.evaluate.subject import Subject


Decode = Callable[[Sequence[int]], str]
"""Token ids to text."""


@dataclass(frozen=True)
class Ask:
    """What is appended after compression, and the tokens that should come then."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    """Accepted answers as texts, for tasks that generate."""


@dataclass(frozen=True)
class Example:
    """Turns to read, then questions that know nothing of each other.

    Attributes:
        note: what the example is, for whoever reads the cell: `{"depth": 0.4}`.
    """

    turns: tuple[tuple[int, ...], ...]
    asks: tuple[Ask, ...]
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return sum(len(turn) for turn in self.turns)


@dataclass(frozen=True)
class Setting:
    """How examples are made.

    Attributes:
        context: tokens that are read, at most.
        count: examples.
        texts: corpora by name, as token ids: see `Task.texts`.
        tokenizer: of the model.
        records: rows of files that are no plain text, by name: see `Task.records`.
    """

    context: int
    count: int
    seed: int
    texts: Mapping[str, Sequence[int]]
    tokenizer: Any
    records: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def random(self, *of: object) -> random.Random:
        """A generator that depends on the seed, the context and `of` alone."""
        return random.Random(f"{self.seed} {self.context} {' '.join(map(str, of))}")

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without special tokens."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def window(self, name: str, count: int, *of: object) -> tuple[int, ...]:
        """`count` consecutive tokens of a corpus, from a place that the seed and `of` decide."""
        text = self.texts[name]
        start = self.random(name, *of).randrange(0, max(1, len(text) - count))
        return tuple(text[start : start + count])


class Task:
    """A task.

    Attributes:
        texts: names of the corpora that it takes its examples from.
        records: names of the JSON lines files that it takes them from.
        metric: of `measure`, the one that ranks methods.
        higher_is_better: whether more of it is better.
        headroom: of `measure`, the one by which the uncompressed model must beat itself without context, or the task is
            not reported; the same sense as `headroom_higher`.
        unit: of the metric, for tables.
        extra: tokens that come after compression, at most.
        has_reference: whether `measure` needs what `reference` gives.
        by_default: whether it is measured where no task is named: not if a model of 135M parameters is below its floor.
    """

    name: str
    metric: str
    unit: ClassVar[str] = ""
    texts: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    higher_is_better: ClassVar[bool] = True
    headroom: str
    headroom_higher: ClassVar[bool] = True
    extra: ClassVar[int] = 128
    has_reference: ClassVar[bool] = False
    by_default: ClassVar[bool] = True

    def examples(self, setting: Setting) -> list[Example]:
        """The examples: the same for the same setting."""
        raise NotImplementedError

    def reference(self, example: Example, full: Subject) -> NDArray[Any]:
        """What `measure` needs of the full cache, which has read the example."""
        raise NotImplementedError

    def measure(
        self, example: Example, subject: Subject, decode: Decode, reference: NDArray[Any] | None
    ) -> dict[str, float]:
        """Numbers of one example, which the subject has read."""
        raise NotImplementedError

"""A number hidden in prose, recalled by completing a sentence: a base model can do it too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from semkv_deploy.evaluate.metrics import correct
from semkv_deploy.evaluate.tasks.base import Ask, Decode, Example, Setting, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.evaluate.subject import Subject

NEEDLE = "\nThe secret pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The secret pass key is"
FIRST, LAST = 0.05, 0.85
"""Depths, as shares of the context: later ones lie in every method's recent window, and tell nothing."""


class Passkey(Task):
    """Five digits at evenly spread depths; examples take turns between the whole context and half of it."""

    name, metric, headroom, texts = "passkey", "recall", "recall", ("prose",)
    unit: ClassVar[str] = "share recalled"
    extra: ClassVar[int] = 128

    def examples(self, setting: Setting) -> list[Example]:
        return [self._example(setting, number) for number in range(setting.count)]

    def _example(self, setting: Setting, number: int) -> Example:
        length = setting.context if number % 2 == 0 else setting.context // 2
        key = f"{setting.random(self.name, number).randrange(10_000, 100_000)}"
        needle = setting.encode(NEEDLE.format(key=key))
        depth = FIRST + (LAST - FIRST) * (number + 0.5) / setting.count
        hay = setting.window("prose", length - len(needle), self.name, number)
        place = int(depth * len(hay))
        return Example(
            turns=((*hay[:place], *needle, *hay[place:]),),
            asks=(Ask(prompt=setting.encode(QUESTION), answer=setting.encode(f" {key}")),),
            note={"depth": round(depth, 2), "length": length},
        )

    def measure(
        self, example: Example, subject: Subject, decode: Decode, reference: NDArray[Any] | None
    ) -> dict[str, float]:
        return {"recall": recalled(example.asks[0], subject)}


def recalled(ask: Ask, subject: Subject) -> float:
    """1 where greedy decoding after the prompt gives the answer's tokens, else 0."""
    logits = subject.follow([*ask.prompt, *ask.answer[:-1]])[len(ask.prompt) - 1 :]
    return float(correct(logits, ask.answer) == len(ask.answer))

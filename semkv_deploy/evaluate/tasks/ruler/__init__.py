"""Tasks in RULER's style (Hsieh et al., arXiv 2404.06654), generated here: needles, and chains of variables."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from semkv_deploy.evaluate.tasks.base import Ask, Decode, Example, Setting, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.evaluate.subject import Subject

WORDS = ("amber", "basil", "cedar", "delta", "ember", "flint", "grove", "hazel", "ivory", "jasper", "lotus", "maple")
HOPS = 4


class Ruler(Task):
    """One of RULER's kinds, asked in words and answered by generation.

    Args:
        kind: "single": one needle; "multikey": eight, one asked for; "variables": a value handed along four variables,
            among chains of other values.
    """

    metric, headroom, texts = "match", "match", ("prose",)
    unit: ClassVar[str] = "share of the expected strings in the answer"
    extra: ClassVar[int] = 256
    by_default: ClassVar[bool] = False

    def __init__(self, kind: str) -> None:
        self.name, self.kind = f"ruler-{kind}", kind

    def examples(self, setting: Setting) -> list[Example]:
        return [self._example(setting, number) for number in range(setting.count)]

    def _example(self, setting: Setting, number: int) -> Example:
        random = setting.random(self.name, number)
        sentences, question, expected = self._variables(random) if self.kind == "variables" else self._needles(random)
        needles = [setting.encode(f" {sentence}") for sentence in sentences]
        hay = setting.window("prose", setting.context - sum(map(len, needles)), self.name, number)
        places = sorted(random.randrange(len(hay)) for _ in needles)
        turn: list[int] = []
        for begin, end, needle in zip([0, *places], [*places, len(hay)], [*needles, ()], strict=True):
            turn += [*hay[begin:end], *needle]
        return Example(turns=(tuple(turn),), asks=(Ask(prompt=setting.encode(question), texts=tuple(expected)),))

    def _needles(self, random: Random) -> tuple[list[str], str, list[str]]:
        words = random.sample(WORDS, 1 if self.kind == "single" else 8)
        numbers = [str(random.randrange(10**6, 10**7)) for _ in words]
        asked = random.randrange(len(words))
        sentences = [f"The special magic number for {w} is {n}." for w, n in zip(words, numbers, strict=True)]
        word = words[asked]
        question = f"\n\nWhat is the special magic number for {word} in the text above? It is the number"
        return sentences, question, [numbers[asked]]

    def _variables(self, random: Random) -> tuple[list[str], str, list[str]]:
        letters = random.sample("ABCDEFGHJKLMNPRSTUVWXYZ", 3 * (HOPS + 1))
        names = [f"V{letter}{random.randrange(10, 100)}" for letter in letters]
        values = random.sample(range(10_000, 100_000), 3)
        chains = [names[at :: len(values)] for at in range(len(values))]
        # Chains run side by side: each sentence only uses what an earlier one gave.
        sentences = []
        for step in range(HOPS + 1):
            for chain, value in zip(chains, values, strict=True):
                sentences.append(f"VAR {chain[step]} = {f'VAR {chain[step - 1]}' if step else value}.")
        question = f"\n\nWhich {HOPS + 1} variables have the value {values[0]} in the text above? They are:"
        return sentences, question, chains[0]

    def measure(
        self, example: Example, subject: Subject, decode: Decode, reference: NDArray[Any] | None
    ) -> dict[str, float]:
        (ask,) = example.asks
        text = decode(subject.generate(ask.prompt, 64))
        return {"match": matched(text, ask.texts)}


def matched(text: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that a text has."""
    return sum(each.lower() in text.lower() for each in expected) / len(expected)

"""Facts stated early in several turns, each recalled by completing its sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from semkv_deploy.evaluate.tasks.base import Ask, Decode, Example, Setting, Task
from semkv_deploy.evaluate.tasks.passkey import recalled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.evaluate.subject import Subject

FACTS = 6
NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irene", "Jacob", "Karen", "Louis")
SENTENCE = "The locker number of {name} is"
EARLY = 0.6
"""Share of the context in which facts are stated; prose alone fills the rest."""


class Facts(Task):
    """A turn for each fact, with prose around it; questions come after the last turn and know nothing of each other."""

    name, metric, headroom, texts = "facts", "recall", "recall", ("prose",)
    unit: ClassVar[str] = f"share recalled, of {FACTS} facts"
    extra: ClassVar[int] = 128

    def examples(self, setting: Setting) -> list[Example]:
        return [self._example(setting, number) for number in range(setting.count)]

    def _example(self, setting: Setting, number: int) -> Example:
        random = setting.random(self.name, number)
        facts = {name: str(random.randrange(1000, 10_000)) for name in random.sample(NAMES, FACTS)}
        stated = [setting.encode(f"\n{SENTENCE.format(name=name)} {value}.\n") for name, value in facts.items()]
        hay = setting.window("prose", setting.context - sum(map(len, stated)), self.name, number)
        step = int(EARLY * len(hay)) // FACTS
        turns = [(*hay[at * step : (at + 1) * step], *fact) for at, fact in enumerate(stated)]
        asks = (
            Ask(prompt=setting.encode(f"\n{SENTENCE.format(name=name)}"), answer=setting.encode(f" {value}"))
            for name, value in facts.items()
        )
        return Example(turns=(*turns, hay[FACTS * step :]), asks=tuple(asks))

    def measure(
        self, example: Example, subject: Subject, decode: Decode, reference: NDArray[Any] | None
    ) -> dict[str, float]:
        return {"recall": sum(recalled(ask, subject) for ask in example.asks) / len(example.asks)}

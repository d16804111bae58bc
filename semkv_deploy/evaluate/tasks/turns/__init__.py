"""Prose that comes in many turns: how the next turn's distributions move when earlier ones were compressed."""

from __future__ import annotations

from typing import ClassVar

from semkv_deploy.evaluate.tasks.base import Ask, Example, Setting
from semkv_deploy.evaluate.tasks.continuation import Continuation

LEAST, MOST = 24, 128
"""Tokens of a turn."""


class Turns(Continuation):
    """Reads turns one after the other, each with what earlier ones left, then predicts the next turn's tokens."""

    # It is `prose` for methods that compress at once.
    by_default: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__("prose")
        self.name = "turns"

    def examples(self, setting: Setting) -> list[Example]:
        return [self._example(setting, number) for number in range(setting.count)]

    def _example(self, setting: Setting, number: int) -> Example:
        random = setting.random(self.name, number)
        window = setting.window("prose", setting.context + self.extra, self.name, number)
        turns, at = list[tuple[int, ...]](), 0
        while at < setting.context:
            end = min(setting.context, at + random.randint(LEAST, MOST))
            turns.append(window[at:end])
            at = end
        # As in a continuation the first token of the next turn is not predicted.
        return Example(tuple(turns), (Ask(prompt=window[at:-1], answer=window[at + 1 :]),), {"turns": len(turns)})

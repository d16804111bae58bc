"""How long greedy decoding goes the full cache's way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from semkv_deploy.evaluate.metrics import correct
from semkv_deploy.evaluate.tasks.base import Ask, Decode, Example, Setting, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.evaluate.subject import Subject

LENGTH = 64
"""Tokens that the full cache generates."""


class Agreement(Task):
    """The full cache continues prose greedily; others are asked how many of its tokens they would give."""

    name, metric, headroom, texts = "agreement", "tokens", "tokens", ("prose",)
    unit: ClassVar[str] = f"greedy tokens like the full cache's, of {LENGTH}"
    extra: ClassVar[int] = LENGTH
    has_reference: ClassVar[bool] = True

    def examples(self, setting: Setting) -> list[Example]:
        windows = (setting.window("prose", setting.context + 1, self.name, n) for n in range(setting.count))
        return [Example(turns=(window[:-1],), asks=(Ask(prompt=window[-1:]),)) for window in windows]

    def reference(self, example: Example, full: Subject) -> NDArray[Any]:
        return np.array(full.generate(example.asks[0].prompt, LENGTH, stop=False), np.int64)

    def measure(
        self, example: Example, subject: Subject, decode: Decode, reference: NDArray[Any] | None
    ) -> dict[str, float]:
        assert reference is not None, "the full cache is measured first"
        generated = reference.tolist()
        # Forced, not generated: the same number from one run instead of 64.
        logits = subject.follow([*example.asks[0].prompt, *generated[:-1]])
        return {"tokens": float(correct(logits, generated))}

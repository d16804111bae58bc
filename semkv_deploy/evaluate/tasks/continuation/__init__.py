"""How the next tokens' distribution moves: KL to the full cache, and perplexity, on a text that goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from semkv_deploy.evaluate.metrics import log_softmax, mean_nll
from semkv_deploy.evaluate.tasks.base import Ask, Decode, Example, Setting, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.evaluate.subject import Subject

LENGTH = 96
"""Tokens that are predicted."""


class Continuation(Task):
    """Reads a window of a corpus, then predicts the tokens that follow it.

    Args:
        corpus: which; the task's name too.
    """

    metric, headroom = "kl", "nll"
    unit: ClassVar[str] = "KL, nats per token"
    higher_is_better: ClassVar[bool] = False
    headroom_higher: ClassVar[bool] = False
    extra: ClassVar[int] = LENGTH
    has_reference: ClassVar[bool] = True

    def __init__(self, corpus: str) -> None:
        self.name, self.texts = corpus, (corpus,)

    def examples(self, setting: Setting) -> list[Example]:
        windows = (setting.window(self.name, setting.context + LENGTH, number) for number in range(setting.count))
        # The last token that is read before compression predicts nothing: its logits are the uncompressed cache's.
        return [
            Example(
                turns=(window[: setting.context],),
                asks=(Ask(prompt=window[setting.context : -1], answer=window[setting.context + 1 :]),),
            )
            for window in windows
        ]

    def reference(self, example: Example, full: Subject) -> NDArray[Any]:
        return full.follow(example.asks[0].prompt)

    def measure(
        self, example: Example, subject: Subject, decode: Decode, reference: NDArray[Any] | None
    ) -> dict[str, float]:
        (ask,) = example.asks
        logits = subject.follow(ask.prompt)
        assert reference is not None, "the full cache is measured first"
        # A token at a time: two copies of all logits in float64 would be the largest thing in memory.
        divergence = []
        for mine, full in zip(logits, reference, strict=True):
            log_p, log_q = log_softmax(full), log_softmax(mine)
            divergence.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
        nll = mean_nll(logits, ask.answer)
        return {"kl": float(np.mean(divergence)), "nll": nll, "perplexity": float(np.exp(nll))}

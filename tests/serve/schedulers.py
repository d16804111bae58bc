"""Schedulers over the tiny bundle, and callers that note what they hear."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semkv_deploy.bundle import Bundle
from semkv_deploy.runtime.conversation import ChatFormat
from semkv_deploy.runtime.open import open_bundle, open_session
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.turn import Finished, Piece


class Parts(NamedTuple):
    bundle: Bundle
    tokenizer: Any
    form: ChatFormat

    @classmethod
    def of(cls, root: Path) -> Parts:
        bundle, tokenizer = open_bundle(root), load_tokenizer(root)
        model = bundle.manifest.model
        return cls(bundle, tokenizer, ChatFormat(tokenizer, model.eos_token_ids, model.vocab_size))


def prompt(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 512, count).tolist()


class Heard:
    """A listener that notes everything, and that nothing follows the end."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.ids: list[int] = []
        self.text = ""
        self.end: Finished | None = None
        self.ended = threading.Event()

    def __call__(self, event: Any) -> None:
        assert self.end is None, "nothing follows the end"
        self.events.append(event)
        if isinstance(event, Piece):
            self.ids += event.ids
            self.text += event.text
        else:
            self.end = event
            self.ended.set()

    @property
    def error(self) -> str:
        assert self.end is not None
        return str(self.end.error)


def scheduler(parts: Parts, batch: int = 4, **options: Any) -> Scheduler:
    """Without a thread: `run` it. Prompts are past the capacity of 128 slots soon."""
    session = open_session(parts.bundle, budget=0.25, batch=batch, threads=1)
    return Scheduler(session, parts.tokenizer, form=parts.form, **options)


def run(server: Scheduler) -> None:
    while server.advance():
        pass


def alone(parts: Parts, turns: list[list[int]], count: int, stop_ids: Sequence[int] = ()) -> list[list[int]]:
    """Replies to the turns of a conversation that has a session of its own."""
    session = open_session(parts.bundle, budget=0.25, threads=1)
    replies = []
    for ids in turns:
        replies.append(session.generate(ids, max_new_tokens=count, stop_ids=stop_ids)[0])
        session.end_turn()
    return replies

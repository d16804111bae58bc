"""Sessions on the rows of one engine: tokens are those of each conversation alone, whatever others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.runtime.open import open_bundle, open_session
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.turn import Finished, Piece, Request, Unavailable


def prompt(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 512, count).tolist()


class Heard:
    def __init__(self) -> None:
        self.events: list[Any] = []
        self.ids: list[int] = []
        self.end: Finished | None = None

    def __call__(self, event: Any) -> None:
        assert self.end is None, "nothing follows the end"
        self.events.append(event)
        if isinstance(event, Piece):
            self.ids += event.ids
        else:
            self.end = event


@pytest.fixture(scope="module")
def parts(tiny_bundle: Path) -> Any:
    return open_bundle(tiny_bundle), load_tokenizer(tiny_bundle)


def scheduler(parts: Any, batch: int = 4, **options: Any) -> Scheduler:
    bundle, tokenizer = parts
    return Scheduler(open_session(bundle, budget=0.25, batch=batch, threads=1), tokenizer, **options)


def run(server: Scheduler) -> None:
    while server.advance():
        pass


def alone(parts: Any, turns: list[list[int]], count: int) -> list[list[int]]:
    session = open_session(parts[0], budget=0.25, threads=1)
    replies = []
    for ids in turns:
        replies.append(session.generate(ids, max_new_tokens=count)[0])
        session.end_turn()
    return replies


def test_interleaved_conversations_are_what_they_are_alone(parts: Any):
    """Six turns on four rows, all submitted at once, past the capacity of 128 slots."""
    server = scheduler(parts)
    turns = {f"s{s}": [prompt(10 * s + t, 45 + 9 * s) for t in range(3)] for s in range(4)}
    heard: dict[str, list[Heard]] = {name: [] for name in turns}
    for turn in range(3):
        for name in turns:
            heard[name].append(Heard())
            server.submit(name, Request(ids=turns[name][turn], max_new_tokens=12), heard[name][-1])
    run(server)
    for name, prompts in turns.items():
        assert [each.ids for each in heard[name]] == alone(parts, prompts, 12)
        assert all(each.end and each.end.left == "ended" for each in heard[name])
    assert server.statistics.compressions > 0 and server.held().rows_used == 4


def test_rows_run_out_and_come_back(parts: Any):
    server = scheduler(parts, batch=1)
    server.submit("a", Request(ids=[5, 6], max_new_tokens=2), Heard())
    run(server)
    refused, taken = Heard(), Heard()
    server.submit("b", Request(ids=[5, 6], max_new_tokens=2), refused)
    run(server)
    assert refused.end and isinstance(refused.end.error, Unavailable) and "no row is free" in str(refused.end.error)
    server.end_session("a")
    run(server)
    server.submit("b", Request(ids=[5, 6], max_new_tokens=2), taken)
    run(server)
    assert taken.end and taken.end.reason == "length"


def test_a_saved_session_goes_on(parts: Any, tmp_path: Path):
    server = scheduler(parts, batch=1, on_full="save", folder=tmp_path)
    turns = {name: [prompt(ord(name) + t, 60) for t in range(3)] for name in "ab"}
    heard: dict[str, list[Heard]] = {"a": [], "b": []}
    for turn in range(3):
        for name in turns:
            heard[name].append(Heard())
            server.submit(name, Request(ids=turns[name][turn], max_new_tokens=6), heard[name][-1])
            run(server)
    for name, prompts in turns.items():
        assert [each.ids for each in heard[name]] == alone(parts, prompts, 6)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_with_random_cancels(seed: int, parts: Any):
    """A turn that was undone never was: the others' tokens are those of a conversation without it."""
    random = np.random.default_rng(seed)
    server = scheduler(parts)
    sent: dict[str, list[tuple[list[int], Heard]]] = {f"s{s}": [] for s in range(4)}
    running = []
    for number in range(24):
        name, heard, ids = f"s{number % 4}", Heard(), prompt(100 * seed + number, int(random.integers(1, 40)))
        sent[name].append((ids, heard))
        running.append(server.submit(name, Request(ids=ids, max_new_tokens=5), heard))
        for _ in range(random.integers(0, 6)):
            server.advance()
        if random.random() < 0.3:
            running[random.integers(len(running))].cancel()
    run(server)
    for turns in sent.values():
        assert all(heard.end is not None for _, heard in turns)
        if all(heard.end and heard.end.left in ("ended", "undone") for _, heard in turns):
            whole = [(ids, heard) for ids, heard in turns if heard.end and heard.end.left == "ended"]
            assert [heard.ids for _, heard in whole] == alone(parts, [ids for ids, _ in whole], 5)
    assert server.statistics.turns == 24 and server.held().running == server.held().waiting == 0

"""Sessions on the rows of one engine: tokens are those of each conversation alone, whatever others do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.serve.turn import Failed, Request, Unavailable, UnknownSession

from .schedulers import Heard, Parts, alone, prompt, run, scheduler


def test_interleaved_conversations_are_what_they_are_alone(parts: Parts):
    """Twelve turns on four rows, all submitted at once, past the capacity of 128 slots."""
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


def test_rows_run_out_and_come_back(parts: Parts):
    server = scheduler(parts, batch=1)
    server.submit("a", Request(ids=[5, 6], max_new_tokens=2), Heard())
    run(server)
    refused, taken = Heard(), Heard()
    server.submit("b", Request(ids=[5, 6], max_new_tokens=2), refused)
    run(server)
    assert refused.end and isinstance(refused.end.error, Unavailable) and "no row is free" in refused.error
    assert server.statistics.refused == 1
    server.end_session("a")
    run(server)
    server.submit("b", Request(ids=[5, 6], max_new_tokens=2), taken)
    run(server)
    assert taken.end and taken.end.reason == "length"


def test_a_turn_waits_for_a_row_as_long_as_it_is_told(parts: Parts):
    now = [0.0]
    server = scheduler(parts, batch=1, wait_seconds=10.0, clock=lambda: now[0])
    server.submit("a", Request(ids=[5, 6], max_new_tokens=2), Heard())
    run(server)
    first, second = Heard(), Heard()
    server.submit("b", Request(ids=[5, 6], max_new_tokens=2), first)
    run(server)
    assert first.end is None and server.held().waiting == 1
    now[0] = 11.0
    run(server)
    assert "no row is free" in first.error
    server.submit("b", Request(ids=[5, 6], max_new_tokens=2), second)
    run(server)
    server.end_session("a")
    run(server)
    assert second.end and second.end.reason == "length"


def test_an_idle_session_loses_its_row(parts: Parts):
    now = [0.0]
    server = scheduler(parts, batch=2, idle_seconds=60.0, clock=lambda: now[0])
    for name in "ab":
        server.submit(name, Request(ids=prompt(1, 9), max_new_tokens=2), Heard())
        run(server)
        now[0] += 50.0
    assert server.held().rows_used == 2
    server.advance()
    assert server.held().rows_used == server.held().sessions == 1 and server.statistics.evicted == 1
    again = Heard()
    server.submit("a", Request(ids=prompt(1, 9), max_new_tokens=2), again)
    run(server)
    assert again.end and again.end.cached_tokens == 0, "it began anew"


@pytest.mark.parametrize("on_full", ["refuse", "forget"])
def test_no_more_sessions_than_allowed(on_full: Any, parts: Parts):
    server = scheduler(parts, batch=2, max_sessions=1, on_full=on_full)
    heard = {name: Heard() for name in "ab"}
    for name in "ab":
        server.submit(name, Request(ids=[5, 6], max_new_tokens=2), heard[name])
        run(server)
    assert server.held().sessions == 1
    if on_full == "refuse":
        assert "too many sessions (expected at most 1)" in heard["b"].error
    else:
        assert heard["b"].end and heard["b"].end.left == "ended"


def test_no_more_turns_wait_than_allowed(parts: Parts):
    server = scheduler(parts, max_waiting=2)
    for _ in range(2):
        server.submit("a", Request(ids=[5, 6]), Heard())
    with pytest.raises(Unavailable, match=r"too many turns wait \(expected at most 2\)"):
        server.submit("a", Request(ids=[5, 6]), Heard())


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(), "one of ids, text and messages"),
        (Request(ids=[1], text="a"), "got ids and text"),
        (Request(ids=[1], max_new_tokens=0), "max_new_tokens: out of range"),
        (Request(ids=[1], max_new_tokens=513), r"more tokens than a reply may have \(expected at most 512, got 513\)"),
        (Request(text="a", stop=["b", ""]), "an empty text would end every reply"),
    ],
)
def test_a_request_that_no_session_serves(request_: Request, words: str, parts: Parts):
    with pytest.raises(SemkvError, match=words):
        scheduler(parts).submit("a", request_, Heard())


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(ids=[5, 512]), r"no token of the model has this id \(expected 0 to 511, got 512\)"),
        (Request(ids=[-1]), "got -1"),
        (Request(ids=[5] * 600), "600 more tokens do not fit the context"),
        (Request(messages=[{"role": "user", "content": "a"}]), r"messages or of tokens.*expected ids or text"),
    ],
)
def test_what_is_refused_leaves_the_session_as_it_was(request_: Request, words: str, parts: Parts):
    server, refused, after = scheduler(parts), Heard(), Heard()
    turns = [prompt(1, 30), prompt(2, 20)]
    server.submit("a", Request(ids=turns[0], max_new_tokens=4), Heard())
    server.submit("a", request_, refused)
    server.submit("a", Request(ids=turns[1], max_new_tokens=4), after)
    run(server)
    assert refused.end and refused.end.left == "undone" and not isinstance(refused.end.error, Failed)
    with pytest.raises(SemkvError, match=words):
        raise refused.end.error or AssertionError
    assert after.ids == alone(parts, turns, 4)[1]


def test_a_session_that_ends_frees_its_row(parts: Parts):
    server, heard = scheduler(parts, batch=1), Heard()
    server.submit("a", Request(ids=[5, 6], max_new_tokens=2, end_session=True), heard)
    run(server)
    assert heard.end and heard.end.left == "ended" and server.held().sessions == server.held().rows_used == 0


def test_a_session_that_is_to_be_gone_on_with_has_to_be_there(parts: Parts):
    """And one that is to begin begins anew, also behind a turn that ends it."""
    server = scheduler(parts, batch=1, on_full="forget")
    heard = [Heard() for _ in range(6)]
    asked: list[tuple[str, dict[str, Any]]] = [
        ("a", {"start": True}),
        ("b", {"start": False}),
        ("a", {"start": False, "end_session": True}),
        ("a", {"start": False}),
        ("a", {"start": True}),
        ("a", {"start": True}),
    ]
    for (name, options), each in zip(asked, heard, strict=True):
        server.submit(name, Request(ids=[5, 6], max_new_tokens=2, **options), each)
    run(server)
    assert all(isinstance(heard[number].end.error, UnknownSession) for number in (1, 3) if heard[number].end)
    assert "session b: there is no such session" in heard[1].error and "session a" in heard[3].error
    cached = [each.end.cached_tokens for each in heard if each.end]
    assert cached[2] > 0 == cached[0] == cached[4] == cached[5]
    assert heard[0].ids == heard[4].ids == heard[5].ids and server.held().sessions == 1
    assert server.statistics.evicted == 0, "who asks for a session that is not there takes nobody's row"


def test_a_session_ends_before_what_came_later(parts: Parts):
    server, heard = scheduler(parts), [Heard(), Heard()]
    for each in heard:
        server.submit("a", Request(ids=[5, 6], max_new_tokens=2), each)
        server.end_session("a")
    run(server)
    assert heard[0].ids == heard[1].ids and server.held().sessions == 0


def test_a_failing_step_takes_turns_back_and_others_go_on(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    """The engine fails once, in a step of two rows: both turns are told, a third session notices nothing."""
    server = scheduler(parts)
    turns = {name: [prompt(ord(name), 20), prompt(ord(name) + 1, 9)] for name in "abc"}
    for name in "ab":
        server.submit(name, Request(ids=turns[name][0], max_new_tokens=6), Heard())
    run(server)
    step, failed = server.session.step, {name: Heard() for name in "ab"}

    def failing(*arguments: Any) -> Any:
        monkeypatch.setattr(server.session, "step", step)
        raise RuntimeError("out of luck")

    for name in "ab":
        server.submit(name, Request(ids=[7, 8], max_new_tokens=6), failed[name])
    server.advance()
    monkeypatch.setattr(server.session, "step", failing)
    server.advance()
    heard, late = {name: Heard() for name in "abc"}, turns["c"]
    for name in "abc":
        server.submit(name, Request(ids=late[0] if name == "c" else turns[name][1], max_new_tokens=6), heard[name])
    run(server)
    broken = [each for each in failed.values() if each.end and each.end.reason == "error"]
    assert broken and all(isinstance(each.end.error, Failed) for each in broken if each.end)
    assert "internal RuntimeError: out of luck" in broken[0].error
    assert heard["c"].ids == alone(parts, [late[0]], 6)[0]
    for name in "ab":
        if failed[name] in broken:
            assert heard[name].ids == alone(parts, turns[name], 6)[1], "as if the failed turn had never been"


def test_a_listener_that_fails_ends_its_turn_alone(parts: Parts):
    def gone(event: Any) -> None:
        raise ConnectionError

    server, other = scheduler(parts), Heard()
    turn = server.submit("a", Request(ids=prompt(1, 9), max_new_tokens=200), gone)
    server.submit("b", Request(ids=prompt(2, 9), max_new_tokens=6), other)
    run(server)
    assert turn.finished and turn.finished.reason == "cancelled" and turn.finished.new_tokens <= 2
    assert other.ids == alone(parts, [prompt(2, 9)], 6)[0]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_with_random_cancels(seed: int, parts: Parts):
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

"""The scheduler in its thread, with callers in theirs: everybody hears the end, whatever happens."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.turn import Request, Unavailable

from .schedulers import Heard, Parts, alone, prompt, scheduler


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def converse(server: Scheduler, name: str, turns: list[list[int]], heard: list[Heard]) -> None:
    for ids in turns:
        heard.append(Heard())
        server.submit(name, Request(ids=ids, max_new_tokens=8), heard[-1])
        assert heard[-1].ended.wait(60)


def test_callers_in_threads(parts: Parts):
    """Six conversations on four rows, sessions that end free theirs, one caller breaks off all the time."""
    server = scheduler(parts, wait_seconds=60.0, on_full="forget")
    server.start()
    turns = {f"s{s}": [prompt(10 * s + t, 45) for t in range(3)] for s in range(3)}
    heard: dict[str, list[Heard]] = {name: [] for name in turns}
    threads = [threading.Thread(target=converse, args=(server, name, turns[name], heard[name])) for name in turns]
    for thread in threads:
        thread.start()
    cancelled = []
    for number in range(20):
        cancelled.append(Heard())
        server.submit(f"c{number}", Request(ids=prompt(number, 20), max_new_tokens=400), cancelled[-1]).cancel()
        time.sleep(0.002)
    for thread in threads:
        thread.join(60)
    assert all(each.ended.wait(20) for each in cancelled)
    server.close()
    for name, prompts in turns.items():
        assert [each.ids for each in heard[name]] == alone(parts, prompts, 8)
    assert {each.end.reason for each in cancelled if each.end} == {"cancelled"}
    assert server.held().running == server.held().waiting == 0


def test_close_ends_what_runs_and_what_waits(parts: Parts):
    server = scheduler(parts, batch=1, wait_seconds=60.0)
    server.start()
    heard = [Heard() for _ in range(4)]
    for number, each in enumerate(heard):
        server.submit(f"s{number // 2}", Request(ids=[5, 6], max_new_tokens=400), each)
    assert eventually(lambda: bool(heard[0].events))
    server.close()
    assert all(each.end is not None for each in heard) and heard[-1].end and heard[-1].end.reason == "cancelled"
    with pytest.raises(Unavailable, match="the server is ending"):
        server.submit("a", Request(ids=[5]), Heard())


def test_idle_sessions_expire_without_a_call(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("semkv_deploy.serve.scheduler.IDLE_WAIT", 0.02)
    server = scheduler(parts, idle_seconds=0.1)
    server.start()
    converse(server, "a", [[5, 6]], [])
    assert eventually(lambda: server.held().rows_used == 0) and server.statistics.evicted == 1
    server.close()


def test_a_mistake_of_the_scheduler_is_told_to_everybody(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    server = scheduler(parts, batch=2, wait_seconds=60.0)
    server.start()
    heard = [Heard() for _ in range(3)]
    for number, each in enumerate(heard):
        server.submit(f"s{number}", Request(ids=[5, 6], max_new_tokens=400), each)
    assert eventually(lambda: bool(heard[0].events))

    def mistaken(*arguments: Any) -> None:
        raise ZeroDivisionError("a mistake")

    with caplog.at_level(logging.ERROR):
        monkeypatch.setattr(server._table, "expire", mistaken)
        assert all(each.ended.wait(20) for each in heard)
    assert all("a mistake" in each.error for each in heard) and "ZeroDivisionError" in caplog.text
    with pytest.raises(Unavailable, match="the server failed: a mistake"):
        server.submit("a", Request(ids=[5]), Heard())
    server.close()
    assert isinstance(server.failure, ZeroDivisionError)

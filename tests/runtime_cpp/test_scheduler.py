"""The scheduler of libsemkv's Triton backend, without Triton: many callers, sessions and cancels over a few rows."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy import open_bundle, open_session
from semkv_deploy.runtime.sampling import Sampler

from ..bundle.test_contract import words
from .driver import onnxruntime_library

INVALID, UNKNOWN, UNAVAILABLE = 0, 1, 2
STOP = 1


def schedule(program: Path, bundle: Path, callers: list[list[dict[str, Any]]], **options: Any) -> dict[str, Any]:
    """What became of each caller's turns, and the scheduler's numbers at the end."""
    command = [str(program), str(bundle), onnxruntime_library(), "0.5"]
    environment = {**os.environ, "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1"}
    text = json.dumps({"callers": callers, **options})
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def alone(bundle: Path, turns: list[dict[str, Any]]) -> list[list[int]]:
    """Replies to the turns of a conversation that has a session of its own, in Python."""
    session = open_session(open_bundle(bundle), threads=1)
    replies = []
    for turn in turns:
        sampler = Sampler(turn.get("temperature", 0.0), seed=turn.get("seed", 0))
        given = {"max_new_tokens": turn["most"], "stop_ids": [STOP], "sampler": sampler}
        replies.append(session.generate(turn["ids"], **given)[0])
        session.end_turn()
    return replies


def conversation(number: int, turns: int, most: int = 6, tokens: int = 45) -> list[dict[str, Any]]:
    return [
        {
            "session": f"s{number}",
            "ids": words(100 * number + turn, tokens),
            "most": most,
            "start": turn == 0,
            "end": turn == turns - 1,
            "temperature": 0.7 if number % 2 else 0.0,
            "seed": number + turn,
        }
        for turn in range(turns)
    ]


@pytest.fixture(scope="module")
def program(driver: Path) -> Path:
    return driver.parent / "semkv_schedule"


def test_sessions_share_rows_and_reply_as_alone(program: Path, bundle_of: Callable[..., Path]):
    """More sessions than rows, past the capacity; some sampled. A caller that goes costs the others nothing."""
    bundle = bundle_of("semanticache")
    callers = [conversation(number, 6) for number in range(9)]
    chance = random.Random(4)
    leaving = [
        [{"ids": words(number, 30), "most": 60, "gone_after": chance.randrange(8)} for _ in range(4)]
        for number in range(3)
    ]
    found = schedule(program, bundle, [*callers, *leaving], rows=4, wait_seconds=120)
    for turns, replies in zip(callers, found["callers"], strict=False):
        assert [each["error"] for each in replies] == [""] * len(turns)
        assert [each["ids"] for each in replies] == alone(bundle, turns)
        assert all(b["cached_tokens"] >= a["prompt_tokens"] for a, b in itertools.pairwise(replies))
    reasons = {each["reason"] for replies in found["callers"][9:] for each in replies}
    assert reasons == {"cancelled"}
    counted = found["statistics"]
    assert (counted["turns"], counted["cancelled"], counted["failed"]) == (66, 12, 0)
    assert counted["compressions"] > 0
    assert counted["sessions"] == counted["rows_used"] == counted["running"] == counted["waiting"] == 0


def test_a_turn_that_is_broken_off_is_taken_back(program: Path, bundle_of: Callable[..., Path]):
    """Where nothing was compressed since it began: its session goes on as if it had never been."""
    bundle = bundle_of("semanticache")
    first, last = conversation(1, 2, most=4, tokens=20)
    gone = {"session": "s1", "ids": words(77, 20), "most": 50, "start": False, "gone_after": 3}
    found = schedule(program, bundle, [[first, gone, last]], rows=1)
    replies = found["callers"][0]
    assert [each["reason"] for each in replies] == ["length", "cancelled", "length"]
    assert [replies[0]["ids"], replies[2]["ids"]] == alone(bundle, [first, last])
    assert replies[2]["cached_tokens"] == 24


def test_refusals(program: Path, bundle_of: Callable[..., Path]):
    bundle, [begun, again] = bundle_of("semanticache"), conversation(1, 2)
    other = {**begun, "session": "other", "after_ms": 700}
    found = schedule(program, bundle, [[begun], [other]], rows=1, wait_seconds=0)
    assert found["callers"][0][0]["error"] == ""
    (refused,) = found["callers"][1]
    assert refused["fault"] == UNAVAILABLE and "session other: no row is free (got 0 of 1" in refused["error"]
    found = schedule(
        program, bundle, [[begun], [{**other, "after_ms": 1200}]], rows=1, wait_seconds=0, idle_seconds=0.2
    )
    assert found["callers"][1][0]["error"] == "", "the other lost its row while it was idle"
    turns: list[tuple[dict[str, Any], int, str]] = [
        ({**again, "session": "who"}, UNKNOWN, "session who: there is no such session: it never began, has ended"),
        ({"ids": [5, 512]}, INVALID, "no token of the model has this id (expected 0 to 511, got 512)"),
        ({"ids": words(1, 600)}, INVALID, "600 more tokens do not fit the context"),
        ({"ids": [5], "most": 0}, INVALID, "max_tokens: out of range (expected 1 to 512, got 0)"),
        ({"ids": [5], "temperature": -1.0}, INVALID, "temperature: out of range"),
        ({"session": "named", "ids": [5], "most": 1, "start": True}, -1, ""),
        ({"session": "more", "ids": [5]}, UNAVAILABLE, "scheduler: too many sessions (expected at most 1)."),
    ]
    found = schedule(program, bundle, [[turn for turn, _, _ in turns]], rows=2, max_sessions=1)
    for (_, fault, sentence), reply in zip(turns, found["callers"][0], strict=True):
        assert reply["fault"] == fault and sentence in reply["error"], reply
    assert found["statistics"]["sessions"] == found["statistics"]["rows_used"] == 1

"""Numbers of a run of known turns, and their text as Prometheus reads it."""

from __future__ import annotations

import re

from semkv_deploy.serve.statistics import BOUNDS, Times, prometheus
from semkv_deploy.serve.turn import Request

from .schedulers import Heard, Parts, prompt, run, scheduler


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'semkv_\w+(\{le="[\w.+-]+"\})? \S+', line) for line in lines)
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_numbers_of_known_turns(parts: Parts):
    now = [0.0]

    def clock() -> float:
        now[0] += 0.2
        return now[0]

    server = scheduler(parts, batch=2, clock=clock)
    heard = [Heard() for _ in range(3)]
    for number, each in enumerate(heard[:2]):
        server.submit(f"s{number}", Request(ids=prompt(number, 100), max_new_tokens=30), each)
    server.submit("s0", Request(ids=[5, 6], max_new_tokens=3), heard[2]).cancel()
    run(server)
    new = sum(len(each.ids) for each in heard)
    found = samples(prometheus(server.statistics, server.held()))
    expected = {
        "prompt_tokens_total": 200,
        "new_tokens_total": new,
        "turns_total": 3,
        "cancelled_total": 1,
        "failed_total": 0,
        "rows": 2,
        "rows_used": 2,
        "sessions": 2,
        "running": 0,
        "waiting": 0,
        "time_to_first_token_seconds_count": 2,
        "time_per_output_token_seconds_count": new - 2,
        'time_per_output_token_seconds_bucket{le="+Inf"}': new - 2,
        'time_per_output_token_seconds_bucket{le="0.1"}': 0,
        "cache_bytes": server.session.engine.cache_bytes(),
    }
    assert {name: found[f"semkv_{name}"] for name in expected} == expected
    assert found["semkv_compressions_total"] > 0 and found["semkv_compress_seconds_total"] > 0


def test_times_are_counted_in_the_bucket_that_ends_above_them():
    times = Times()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] + 1e-9, 1e9):
        times.add(seconds)
    assert times.counts[0] == 2 and times.counts[1] == 1 and times.counts[-1] == 1

"""What a scheduler counts, and its text for Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import accumulate

from semkv_deploy.runtime.behaviours.base import CompressionStats
from semkv_deploy.serve.turn import FinishReason, Turn

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Seconds: upper ends of the buckets in which times are counted."""


@dataclass
class Times:
    """Times in seconds: how many in each bucket (the last has no upper end), and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


@dataclass
class Statistics:
    """Counters since the start.

    Attributes:
        prompt_tokens, new_tokens: appended and generated.
        turns, cancelled, failed, refused: ended in whatever way, and of these broken off, failed, and not begun for
            want of a row or of a place in the queue.
        evicted: sessions that lost their row while idle.
        not_saved: how often an idle session could not be saved, and kept its row.
        compressions, compress_seconds: as the session counts them.
        time_to_first_token_seconds: from `submit` (TTFT), one a turn.
        time_per_output_token_seconds: between tokens of a turn (TPOT).
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    turns: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    evicted: int = 0
    not_saved: int = 0
    compressions: int = 0
    compress_seconds: float = 0.0
    time_to_first_token_seconds: Times = field(default_factory=Times)
    time_per_output_token_seconds: Times = field(default_factory=Times)
    _compressed: tuple[int, float] = (0, 0.0)

    def count_end(self, reason: FinishReason, *, refused: bool = False) -> None:
        """Counts a turn that ended."""
        self.turns += 1
        self.cancelled += reason == "cancelled"
        self.failed += reason == "error"
        self.refused += refused

    def count_token(self, turn: Turn, now: float) -> None:
        """Counts a token that a turn generated, for the turn too."""
        if turn.generated == 0:
            self.time_to_first_token_seconds.add(now - turn.submitted)
        else:
            self.time_per_output_token_seconds.add(now - turn.last_token)
        turn.last_token = now
        turn.generated += 1
        self.new_tokens += 1

    def count_compressions(self, stats: CompressionStats) -> None:
        """Adds what was compressed since the last call; a session of one row counts anew when it is reset."""
        runs, seconds = self._compressed if stats.runs >= self._compressed[0] else (0, 0.0)
        self.compressions += stats.runs - runs
        self.compress_seconds += stats.seconds - seconds
        self._compressed = (stats.runs, stats.seconds)


@dataclass(frozen=True)
class Held:
    """What a scheduler holds: sessions (saved ones included), rows in use, of how many, turns, and bytes of caches."""

    sessions: int
    rows_used: int
    rows: int
    running: int
    waiting: int
    cache_bytes: int


def numbers(counted: Statistics, held: Held) -> Iterator[tuple[str, str, float]]:
    """Each number as (name, "counter" or "gauge", value); of times, sum and count."""
    for each in fields(counted):
        value = getattr(counted, each.name)
        if isinstance(value, Times):
            yield f"semkv_{each.name}_sum", "counter", value.total
            yield f"semkv_{each.name}_count", "counter", sum(value.counts)
        elif not each.name.startswith("_"):
            yield f"semkv_{each.name}_total", "counter", value
    for each in fields(held):
        yield f"semkv_{each.name}", "gauge", getattr(held, each.name)


def prometheus(counted: Statistics, held: Held) -> str:
    """Both in Prometheus' text format; rates are its own to take (`rate(semkv_new_tokens_total[1m])`)."""
    lines = []
    for name, kind, value in numbers(counted, held):
        if not name.endswith(("_sum", "_count")):
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
    for name, times in vars(counted).items():
        if isinstance(times, Times):
            lines += _histogram(f"semkv_{name}", times)
    return "\n".join(lines) + "\n"


def _histogram(name: str, times: Times) -> list[str]:
    below = list(accumulate(times.counts))
    bounds: list[float | str] = [*BOUNDS, "+Inf"]
    lines = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, below, strict=True)]
    return [f"# TYPE {name} histogram", *lines, f"{name}_sum {times.total}", f"{name}_count {below[-1]}"]

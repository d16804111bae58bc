"""What a scheduler counts, and its text for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Statistics:
    """Counters since the start, and what is held now.

    Attributes:
        prompt_tokens, new_tokens: appended and generated.
        turns, cancelled, failed, refused: ended in whatever way, and of these broken off, failed; not begun for want
            of a row.
        evicted: sessions that lost their row while idle.
        first_token_seconds, first_tokens: time to first token (TTFT), summed, and how many turns had one.
        token_seconds, later_tokens: time between tokens (TPOT), summed, and how many there were.
        compressions, compress_seconds: as the session counts them.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    turns: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    evicted: int = 0
    first_token_seconds: float = 0.0
    first_tokens: int = 0
    token_seconds: float = 0.0
    later_tokens: int = 0
    compressions: int = 0
    compress_seconds: float = 0.0


@dataclass(frozen=True)
class Held:
    """What a scheduler holds: sessions (saved ones included), rows in use, of how many, turns, and bytes of caches."""

    sessions: int
    rows_used: int
    rows: int
    running: int
    waiting: int
    cache_bytes: int


def prometheus(counted: Statistics, held: Held) -> str:
    """Both in Prometheus' text format; rates and means are its own to take (`rate(semkv_new_tokens_total[1m])`)."""
    lines = []
    for kind, source, suffix in (("counter", counted, "_total"), ("gauge", held, "")):
        for each in fields(source):
            name = f"semkv_{each.name}{suffix}"
            lines += [f"# TYPE {name} {kind}", f"{name} {getattr(source, each.name)}"]
    return "\n".join(lines) + "\n"

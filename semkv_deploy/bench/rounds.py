"""The measurement: everybody does the same, in turn (A B C A B C …), so that a disturbance hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from semkv_deploy.bench.process import EngineProcess, Measured
from semkv_deploy.bench.statistics import spread
from semkv_deploy.bench.subjects import Subject

LEAST_PROMPT = 64
"""Tokens of a turn's prompt at least."""


@dataclass(frozen=True)
class Shape:
    """What everybody does at one context with one batch.

    Attributes:
        context: tokens that every row has at the end.
        batch: rows.
        turns: of equal length.
        prefills: times that the prompt of a single turn is read, each by an empty cache.
        rounds: of decoding at the end of each turn.
        tokens: decoded in a round.
        reserve: positions of each turn that nothing is appended at: some method may take them for rows of its own.
    """

    context: int
    batch: int
    turns: int
    prefills: int
    rounds: int
    tokens: int
    reserve: int = 0

    @property
    def least_context(self) -> int:
        """The smallest context in which every turn has a prompt."""
        return self.turns * (self.rounds * self.tokens + LEAST_PROMPT + self.reserve)

    def prompts(self, text: Sequence[int]) -> list[list[list[int]]]:
        """Ids by turn and row, cut from one text; each row begins elsewhere in it.

        A turn's prompt comes with the token that was chosen at the end of the turn before: `context / turns` tokens in
        all, reply and reserve included.
        """
        share, place, found = self.context // self.turns, 0, []
        for turn in range(self.turns):
            length = share - self.reserve - self.rounds * self.tokens - (1 if turn else 0)
            rows = [_cut(text, place + row * len(text) // self.batch, length) for row in range(self.batch)]
            found.append(rows)
            place += length
        return found


def _cut(text: Sequence[int], start: int, length: int) -> list[int]:
    """`length` ids from `start` on, the text over and over."""
    start %= len(text)
    repeated = list(text) * ((start + length) // len(text) + 1)
    return repeated[start : start + length]


def measure(
    subjects: Sequence[Subject], shape: Shape, text: Sequence[int], *, threads: int, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Opens a process for each subject, all at once, and lets them do the same.

    Args:
        text: token ids.
        threads: of each.
        say: what is done now.

    Returns:
        A cell for each subject, and what the runtimes say of themselves.

    Raises:
        SemkvError: when one of them fails.
    """
    about: dict[str, str] = {}
    with ExitStack() as stack:
        processes: dict[str, EngineProcess] = {}
        for subject in subjects:
            say(f"opening {subject.name}")
            process = EngineProcess(subject, threads=threads, batch=shape.batch, context=shape.context)
            processes[subject.name] = stack.enter_context(process)
            about |= process.ask("about")
        measured = in_turn(processes, shape, text, say)
    return [
        {
            "name": subject.name, "bundle": subject.bundle, "budget": subject.budget, "cache": subject.cache,
            "context": shape.context, "batch": shape.batch, **measured[subject.name],
        }
        for subject in subjects
    ], about  # fmt: skip


def in_turn(
    measured: Mapping[str, Measured], shape: Shape, text: Sequence[int], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Asks everybody the same, one after the other; returns the values of each.

    Returns:
        By name: ttft_s and tpot_ms (spreads; over turns, where there are several), tokens_per_s (of all rows), turns
        (for each: seen, ttft_s, tpot_ms, live_slots), total_s (of all turns; prompts, replies and what is done between
        them), the facts at the end, and ttft_compress_s (of the last prompt of a single turn, where there is
        compression).
    """
    prompts = shape.prompts(text)
    ttft: dict[str, list[float]] = {name: [] for name in measured}
    tpot: dict[str, list[float]] = {name: [] for name in measured}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in measured}
    total = dict.fromkeys(measured, 0.0)
    compressed: dict[str, dict[str, Any]] = {name: {} for name in measured}

    def prefill(turn: int) -> None:
        for name, each in measured.items():
            say(f"{name}: prompt of {len(prompts[turn][0])} tokens{_of(turn, shape.turns, 'turn')}")
            ttft[name].append(float(each.ask("prefill", rows=prompts[turn])["seconds"]))

    for _ in range(shape.prefills - 1 if shape.turns == 1 else 0):
        prefill(0)
        for each in measured.values():
            each.ask("reset")
    for turn in range(shape.turns):
        prefill(turn)
        for name, each in measured.items() if shape.turns == 1 else ():
            seconds = each.ask("facts").get("compress_s")
            compressed[name] = {} if seconds is None else {"ttft_compress_s": seconds}
        for round_ in range(shape.rounds):
            for name, each in measured.items():
                say(f"{name}: {shape.tokens} steps{_of(turn, shape.turns, 'turn')}{_of(round_, shape.rounds, 'round')}")
                tpot[name].append(float(each.ask("decode", count=shape.tokens)["ms"]))
        for name, each in measured.items():
            steps = tpot[name][-shape.rounds :]
            total[name] += ttft[name][-1] + sum(steps) * shape.tokens / 1e3
            turns[name].append({
                "seen": (turn + 1) * (shape.context // shape.turns),
                "ttft_s": ttft[name][-1],
                "tpot_ms": spread(steps)["median"],
                "live_slots": each.ask("facts")["live_slots"],
            })  # fmt: skip
            if turn < shape.turns - 1:
                total[name] += float(each.ask("end_turn")["seconds"])
    found = {}
    for name, each in measured.items():
        rates = [shape.batch * 1e3 / ms for ms in tpot[name]]
        found[name] = {
            "ttft_s": spread(ttft[name]),
            "tpot_ms": spread(tpot[name]),
            "tokens_per_s": spread(rates),
            "total_s": total[name],
            "turns": turns[name],
            **each.ask("facts"),
            **compressed[name],
        }
    return found


def _of(number: int, count: int, what: str) -> str:
    """Which of several; nothing where there is one."""
    return f", {what} {number + 1} of {count}" if count > 1 else ""

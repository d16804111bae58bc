"""Loads the scheduler of `semkv-deploy serve`: `serve_load.py BUNDLE [--memory 1GiB] [--rows 1 4 16] [--active 1]
[--soak 2000]`.

Three tables. Sessions whose caches fit a memory, by budget. Tokens a second when all rows of an engine generate at
once, by rows, and when some of the most rows do: ratios of one run. And a soak: many turns of a few dozen sessions with
random cancels, after which every turn must have ended, and memory must be what it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import psutil

from semkv_deploy import open_bundle, open_session
from semkv_deploy.budget import label
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.serve.options import ServingOptions
from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.turn import Finished, Listener, Piece, Request
from semkv_deploy.sizes import parse_size, size


def row_bytes(root: Path, budget: float) -> int:
    """Bytes that one more row's caches take."""
    bytes_ = [open_session(open_bundle(root), budget=budget, batch=batch).engine.cache_bytes() for batch in (1, 2)]
    return bytes_[1] - bytes_[0]


def scheduler(root: Path, budget: float, options: ServingOptions) -> Scheduler:
    """Without stops, so that replies have the length that was asked for."""
    session = open_session(open_bundle(root), budget=budget, batch=options.rows, threads=options.threads)
    return Scheduler(session, load_tokenizer(root), wait_seconds=options.wait_seconds, on_full="forget")


def tokens_a_second(server: Scheduler, prompt: int, tokens: int, active: int) -> float:
    """New tokens of all rows a second, while so many rows generate."""
    random, counts = np.random.default_rng(0), [0] * active

    def listener(row: int) -> Listener:
        def heard(event: Piece | Finished) -> None:
            counts[row] += len(event.ids) if isinstance(event, Piece) else 0

        return heard

    # Prompts are read one after the other, while rows before them generate: those have more to go.
    rounds = -(-prompt // server.session.contract.prefill_chunk) * len(counts)
    for row in range(len(counts)):
        ids = random.integers(10, server.session.contract.vocab_size, prompt).tolist()
        server.submit(f"row {row}", Request(ids=ids, max_new_tokens=tokens + rounds + 2), listener(row))
    while min(counts) == 0:
        server.advance()
    before, began = sum(counts), time.perf_counter()
    for _ in range(tokens):
        server.advance()
    return (sum(counts) - before) / (time.perf_counter() - began)


def soak(server: Scheduler, turns: int) -> tuple[int, int, int]:
    """Runs so many turns; returns how many ended, how many of them were cancelled, and what memory grew by."""
    random, ended, cancelled, running = np.random.default_rng(0), 0, 0, []
    process, held = psutil.Process(), 0

    def heard(event: Piece | Finished) -> None:
        nonlocal ended, cancelled
        if isinstance(event, Finished):
            ended += 1
            cancelled += event.reason == "cancelled"

    for number in range(turns):
        ids = random.integers(10, server.session.contract.vocab_size, int(random.integers(1, 60))).tolist()
        running.append(server.submit(f"session {random.integers(24)}", Request(ids=ids, max_new_tokens=8), heard))
        for _ in range(int(random.integers(0, 24))):
            server.advance()
        if random.random() < 0.3:
            running[int(random.integers(len(running)))].cancel()
        running = [turn for turn in running if turn.finished is None] or running[-1:]
        if number == turns // 4:
            # Everything has been used once by now.
            held = process.memory_info().rss
    while server.advance():
        pass
    return ended, cancelled, process.memory_info().rss - held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", type=parse_size, default=1 << 30)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--active", type=int, nargs="+", default=[], help="of the most rows, how many generate")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--soak", type=int, default=0, metavar="TURNS")
    arguments = parser.parse_args()
    budgets = sorted(open_bundle(arguments.bundle).manifest.budgets)
    print(f"sessions whose caches fit {size(arguments.memory)}:")
    for budget in budgets:
        row = row_bytes(arguments.bundle, budget)
        print(f"  budget {label(budget)}: {size(row)} a row, {arguments.memory // row} sessions")
    print(f"tokens a second, budget {budgets[0]:g}:")
    first = 0.0
    most = max(arguments.rows)
    for rows, active in [*((rows, rows) for rows in arguments.rows), *((most, active) for active in arguments.active)]:
        server = scheduler(arguments.bundle, budgets[0], ServingOptions(rows=rows, threads=arguments.threads))
        rate = tokens_a_second(server, arguments.prompt, arguments.tokens, active)
        first = first or rate
        some = "" if active == rows else f", {active} of them generating"
        print(f"  {rows} rows{some}: {rate:.1f} ({rate / first:.2f} times)", flush=True)
    if arguments.soak:
        options = ServingOptions(rows=8, threads=arguments.threads, wait_seconds=9)
        server = scheduler(arguments.bundle, budgets[0], options)
        ended, cancelled, grown = soak(server, arguments.soak)
        counts = f"{ended} ended, {cancelled} cancelled, {server.statistics.refused} refused"
        print(f"{arguments.soak} turns: {counts}; memory grew by {grown / 2**20:.1f} MiB")
        if ended != arguments.soak or server.held().running or server.held().waiting:
            raise SystemExit("turns were lost")


if __name__ == "__main__":
    main()

"""The demo: SmolLM2-135M-Instruct, budgets 1, 0.5 and 0.2, MT-Bench questions as one long conversation.

The full cache speaks first; the compressed caches then get the same tokens one by one, so that time and distribution
are compared at the same place of the same text.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from fetch import fetch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.calibrate import mean_kl
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.methods import SemantiCache
from semkv_deploy.runtime.chat import Chat
from semkv_deploy.runtime.open import open_bundle, open_session
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.terminal import show_table

SYSTEM = "You are a helpful AI assistant."


@dataclass
class Turn:
    """Ids the user's side adds, and ids of the reply."""

    prompt: list[int]
    reply: list[int]


@dataclass
class Run:
    """What one budget gave: milliseconds of each decode step, KL of each reply, live slots at the end."""

    budget: float
    step_ms: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    seen: int = 0
    kept: float = 0.0
    cache_mib: float = 0.0
    compress_s: float = 0.0
    seconds: float = 0.0


class LogitStore:
    """Logits of the full cache's replies, in half precision on disk: `[tokens, vocab]`."""

    def __init__(self, folder: Path, tokens: int, vocab: int) -> None:
        self._rows = np.lib.format.open_memmap(folder / "logits.npy", "w+", np.float16, (tokens, vocab))
        self._next = 0

    def append(self, logits: np.ndarray) -> None:
        self._rows[self._next] = logits
        self._next += 1

    def rows(self, start: int, count: int) -> np.ndarray:
        return self._rows[start : start + count].astype(np.float32)


def questions() -> list[str]:
    """MT-Bench's user messages, in order."""
    lines = fetch("mt-bench").read_text(encoding="utf-8").splitlines()
    return [turn for line in lines for turn in json.loads(line)["turns"]]


def speak(
    bundle: Bundle, tokens: int, reply_tokens: int, folder: Path, bar: Progress
) -> tuple[list[Turn], Run, LogitStore]:
    """The conversation with the full cache, until it is `tokens` long."""
    session = open_session(bundle, budget=1.0)
    tokenizer = load_tokenizer(bundle.root)
    stop = set(bundle.manifest.model.eos_token_ids)
    chat = Chat(session, tokenizer, sorted(stop), system=SYSTEM)
    store = LogitStore(folder, tokens, bundle.manifest.model.vocab_size)
    run, turns, started = Run(1.0), [], time.perf_counter()
    task = bar.add_task("budget 1 speaks", total=tokens)
    for question in questions():
        prompt = chat.user_tokens(question)
        room = bundle.manifest.max_context - int(session.position[0]) - len(prompt)
        if session.position[0] >= tokens or room < reply_tokens:
            break
        logits = session.prefill(prompt)
        reply: list[int] = []
        while len(reply) < reply_tokens:
            chosen = int(logits[0].argmax())
            # The first token may not end the reply: an empty one would say nothing about the cache.
            if chosen in stop and reply:
                break
            store.append(logits[0])
            reply.append(chosen)
            step_started = time.perf_counter()
            logits = session.step([chosen])
            run.step_ms.append((time.perf_counter() - step_started) * 1e3)
        chat.add_reply(reply)
        turns.append(Turn(prompt, reply))
        bar.update(task, completed=min(int(session.position[0]), tokens))
    return turns, finish(run, session, started), store


def listen(bundle: Bundle, budget: float, turns: list[Turn], store: LogitStore, bar: Progress) -> Run:
    """The same tokens through a compressed cache."""
    session = open_session(bundle, budget=budget)
    run, started, seen = Run(budget), time.perf_counter(), 0
    for turn in bar.track(turns, description=f"budget {budget:g} follows"):
        logits = session.prefill(turn.prompt)
        rows = []
        for token in turn.reply:
            rows.append(logits[0].copy())
            step_started = time.perf_counter()
            logits = session.step([token])
            run.step_ms.append((time.perf_counter() - step_started) * 1e3)
        run.kl.append(mean_kl(store.rows(seen, len(rows)), np.stack(rows)))
        seen += len(rows)
        session.end_turn()
    return finish(run, session, started)


def finish(run: Run, session: Any, started: float) -> Run:
    run.seconds = time.perf_counter() - started
    run.seen, run.kept = int(session.position[0]), float(session.length.mean())
    run.cache_mib = session.engine.cache_bytes() / (1 << 20)
    run.compress_s = session.stats.seconds
    return run


def show(runs: list[Run], turns: list[Turn]) -> dict[str, Any]:
    """Prints the table and returns it as data."""
    weights = [len(turn.reply) for turn in turns]
    edge = max(1, min(100, len(runs[0].step_ms) // 4))
    table = Table(title=f"{len(turns)} turns, {runs[0].seen} tokens of conversation")
    for column in ("budget", "kept", "cache MiB", "early ms", "late ms", "compress s", "KL"):
        table.add_column(column, justify="right")
    rows = []
    for run in runs:
        early, late = float(np.median(run.step_ms[:edge])), float(np.median(run.step_ms[-edge:]))
        kl = float(np.average(run.kl, weights=weights)) if run.kl else 0.0
        rows.append(
            {
                "budget": run.budget,
                "tokens": run.seen,
                "kept": run.kept,
                "cache_mib": run.cache_mib,
                "early_ms": early,
                "late_ms": late,
                "compress_s": run.compress_s,
                "kl": kl,
            }
        )
        table.add_row(
            f"{run.budget:g}",
            f"{run.kept:.0f}",
            f"{run.cache_mib:.0f}",
            f"{early:.1f}",
            f"{late:.1f}",
            f"{run.compress_s:.1f}",
            f"{kl:.4f}" if run.kl else "-",
        )
    console = Console()
    show_table(console, table)
    console.print(
        "kept: live entries of a layer, on average; early, late: median of the first and last decode steps; KL: "
        "next-token distributions of the replies against the full cache, nats per token"
    )
    return {"rows": rows, "turns": len(turns)}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo/bundle"), help="Where the bundle goes.")
@click.option("--tokens", type=int, default=6200, help="Length of the conversation.")
@click.option("--max-context", type=int, default=8192)
@click.option("--reply-tokens", type=int, default=64, help="Most tokens of a reply.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Write the table as JSON as well.")
def main(output: Path, tokens: int, max_context: int, reply_tokens: int, as_json: Path | None) -> None:
    """Exports, builds and compares."""
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        if not (output / "bundle.json").exists():
            task = bar.add_task("SmolLM2-135M-Instruct", total=None)

            def report(what: str, share: float | None) -> None:
                bar.update(task, description=what, total=None if share is None else 1, completed=share or 0)
                if not console.is_terminal and share is None:
                    click.echo(what, err=True)

            build_bundle(
                str(fetch("smollm2")),
                output,
                budgets=[0.2, 0.5, 1.0],
                method=SemantiCache(),
                max_context=max_context,
                progress=report,
            )
            bar.remove_task(task)
        bundle = open_bundle(output)
        with tempfile.TemporaryDirectory() as folder:
            turns, full, store = speak(bundle, tokens, reply_tokens, Path(folder), bar)
            runs = [full, *(listen(bundle, budget, turns, store, bar) for budget in (0.5, 0.2))]
    result = show(runs, turns)
    if as_json:
        as_json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(f"\nTalk to it:  .venv/bin/semkv-deploy generate {output} --budget 0.2", err=True)


if __name__ == "__main__":
    sys.exit(main())

"""The demo: SmolLM2-135M-Instruct, budgets 1, 0.5 and 0.2, MT-Bench questions as one long conversation.

The full cache speaks; after each of its replies the compressed caches get the same tokens one by one, so that time and
distribution are compared at the same place of the same text, and what disturbs the machine disturbs all alike.
"""

from __future__ import annotations

import json
import sys
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

BUDGETS = (1.0, 0.5, 0.2)
"""The first speaks."""


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


def questions() -> list[str]:
    """MT-Bench's user messages, in order."""
    lines = fetch("mt-bench").read_text(encoding="utf-8").splitlines()
    return [turn for line in lines for turn in json.loads(line)["turns"]]


class Speaker:
    """The conversation of one budget.

    Args:
        bundle: whose system prompt and template it has.
    """

    def __init__(self, bundle: Bundle, budget: float) -> None:
        self.session = open_session(bundle, budget=budget)
        self.stop = set(bundle.manifest.model.eos_token_ids)
        self.chat = Chat(self.session, load_tokenizer(bundle.root), sorted(self.stop), system=SYSTEM)
        self.run = Run(budget)

    def step(self, token: int) -> np.ndarray:
        """The logits `[V]` that follow a token."""
        started = time.perf_counter()
        logits = self.session.step([token])
        self.run.step_ms.append((time.perf_counter() - started) * 1e3)
        return logits[0].copy()

    def speak(self, prompt: list[int], most: int) -> tuple[list[int], list[np.ndarray]]:
        """Answers; returns the reply and the logits that each of its tokens was chosen from."""
        logits, reply, rows = self.session.prefill(prompt)[0].copy(), list[int](), list[np.ndarray]()
        while len(reply) < most:
            chosen = int(logits.argmax())
            # The first token may not end the reply: an empty one would say nothing about the cache.
            if chosen in self.stop and reply:
                break
            rows.append(logits)
            reply.append(chosen)
            logits = self.step(chosen)
        self.chat.add_reply(reply)
        return reply, rows

    def listen(self, prompt: list[int], reply: list[int], spoken: list[np.ndarray]) -> None:
        """Hears a turn of the full cache's."""
        rows = [self.session.prefill(prompt)[0].copy()]
        rows += [self.step(token) for token in reply]
        self.run.kl.append(mean_kl(np.stack(spoken), np.stack(rows[:-1])))
        self.session.end_turn()

    def finished(self) -> Run:
        """With what the session says in the end."""
        session, run = self.session, self.run
        run.seen, run.kept = int(session.position[0]), float(session.length.mean())
        run.cache_mib = session.engine.cache_bytes() / (1 << 20)
        run.compress_s = session.stats.seconds
        return run


def converse(bundle: Bundle, tokens: int, reply_tokens: int, bar: Progress) -> tuple[list[Run], list[int]]:
    """Turn by turn, until `tokens` are said; returns runs by budget and tokens of each reply."""
    full, *others = (Speaker(bundle, budget) for budget in BUDGETS)
    task, replies = bar.add_task("one conversation", total=tokens), list[int]()
    for question in questions():
        prompt = full.chat.user_tokens(question)
        room = bundle.manifest.max_context - int(full.session.position[0]) - len(prompt)
        if full.session.position[0] >= tokens or room < reply_tokens:
            break
        reply, spoken = full.speak(prompt, reply_tokens)
        for other in others:
            other.listen(prompt, reply, spoken)
        replies.append(len(reply))
        bar.update(task, completed=min(int(full.session.position[0]), tokens))
    return [speaker.finished() for speaker in (full, *others)], replies


def show(runs: list[Run], replies: list[int]) -> dict[str, Any]:
    """Prints the table and returns it as data."""
    edge = max(1, min(100, len(runs[0].step_ms) // 4))
    table = Table(title=f"{len(replies)} turns, {runs[0].seen} tokens of conversation")
    for column in ("budget", "kept", "cache MiB", "early ms", "late ms", "compress s", "KL"):
        table.add_column(column, justify="right")
    rows = []
    for run in runs:
        early, late = float(np.median(run.step_ms[:edge])), float(np.median(run.step_ms[-edge:]))
        kl = float(np.average(run.kl, weights=replies)) if run.kl else 0.0
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
    return {"rows": rows, "turns": len(replies)}


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
                budgets=sorted(BUDGETS),
                method=SemantiCache(),
                max_context=max_context,
                progress=report,
            )
            bar.remove_task(task)
        bundle = open_bundle(output)
        runs, replies = converse(bundle, tokens, reply_tokens, bar)
    result = show(runs, replies)
    if as_json:
        as_json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(f"\nTalk to it:  .venv/bin/semkv-deploy generate {output} --budget 0.2", err=True)


if __name__ == "__main__":
    sys.exit(main())

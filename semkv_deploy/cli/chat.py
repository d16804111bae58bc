"""Runs one prompt or a chat on a bundle, and writes replies as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semkv_deploy.runtime.chat import Chat
from semkv_deploy.runtime.open import open_bundle, open_session
from semkv_deploy.runtime.tokens import TextStream, load_tokenizer

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget
    from semkv_deploy.runtime.sampling import Sampler
    from semkv_deploy.runtime.session import Session


def run(
    root: Path,
    *,
    prompt: str | None,
    raw: bool,
    system: str | None,
    budget: Budget | None,
    max_new_tokens: int,
    sampler: Sampler,
    stats: bool,
    target: str,
    allow_plugins: bool = False,
) -> None:
    """Writes the model's replies to standard output as they come.

    Args:
        prompt: None: chat until an empty line or the input's end.
        raw: complete `prompt` as it is.
        allow_plugins: run native code of plugins in the bundle's engines.
    """
    bundle = open_bundle(root, target, allow_plugins=allow_plugins)
    session = open_session(bundle, budget=budget, target=target)
    tokenizer = load_tokenizer(bundle.root)
    stop_ids = bundle.manifest.model.eos_token_ids

    def write(text: str) -> None:
        click.echo(text, nl=False)

    if prompt is not None and raw:
        _complete(session, tokenizer, prompt, stop_ids, max_new_tokens, sampler)
    else:
        chat = Chat(session, tokenizer, stop_ids, system)
        if prompt is not None:
            chat.say(prompt, max_new_tokens=max_new_tokens, sampler=sampler, stream=write)
            click.echo()
        while prompt is None:
            try:
                text = click.prompt("you", prompt_suffix="> ", default="", show_default=False)
            except click.Abort:
                click.echo()
                break
            if not text:
                break
            chat.say(text, max_new_tokens=max_new_tokens, sampler=sampler, stream=write)
            click.echo()
            if stats:
                click.echo(describe(session), err=True)
    if stats and prompt is not None:
        click.echo(describe(session), err=True)


def _complete(
    session: Session, tokenizer: Any, prompt: str, stop_ids: Sequence[int], max_new_tokens: int, sampler: Sampler
) -> None:
    shown = TextStream(tokenizer)
    session.generate(
        tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        stop_ids=stop_ids,
        callback=lambda row, token: click.echo(shown.push(token), nl=False),
    )
    click.echo()


def describe(session: Session) -> str:
    """Describes in one line what the session holds, and what compression did to get there."""
    stats = session.stats
    seen, kept = int(session.position.max()), int(session.kept_slots.max())
    text = f"{seen} tokens seen, {kept} of {session.contract.capacity} slots live"
    if stats.runs:
        levels = ", ".join(f"level {level}: {count}" for level, count in sorted(stats.levels.items()) if level >= 0)
        text += f"; compressed {stats.runs} times in {stats.seconds:.2f} s ({levels}), {stats.evicted} slots evicted"
    return text

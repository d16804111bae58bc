"""`generate`: text from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.options import allow_plugins_option, budget_option, bundle_argument, target_option
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget


@click.command()
@bundle_argument
@click.option("--prompt", help="One prompt; without it, a chat until an empty line.")
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the chat template.")
@click.option("--system", help="System message.")
@budget_option("the smallest built")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stats", is_flag=True, help="Say afterwards what compression did.")
@target_option()
@allow_plugins_option
def generate(
    bundle: Path,
    prompt: str | None,
    raw: bool,
    system: str | None,
    budget: Budget | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stats: bool,
    target: str,
    allow_plugins: bool,
) -> None:
    """Generates text from a bundle: one prompt, or a chat.

    \b
    semkv-deploy generate bundle/ --prompt "Why is the sky blue?" --budget 0.2
    """
    from semkv_deploy.cli.chat import run
    from semkv_deploy.runtime.sampling import Sampler

    if raw and prompt is None:
        raise SemkvError("needs a prompt", where="--raw", fix="add --prompt")
    run(
        bundle,
        prompt=prompt,
        raw=raw,
        system=system,
        budget=budget,
        max_new_tokens=max_new_tokens,
        sampler=Sampler(temperature, top_p, seed),
        stats=stats,
        target=target,
        allow_plugins=allow_plugins,
    )

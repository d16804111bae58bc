"""`generate`: text from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.options import (
    allow_plugins_option,
    budget_option,
    bundle_argument,
    target_option,
    threads_option,
)
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget


@click.command()
@bundle_argument
@click.option("--prompt", help="One prompt, or - for standard input; without it, a chat until an empty line.")
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a file, or from standard input with -.")
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the chat template.")
@click.option("--system", help="System message.")
@budget_option("the smallest built")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from so many tokens at most; 0: from all.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends the output; may be given several times.")
@click.option("--stats", is_flag=True, help="Say afterwards what compression did.")
@target_option()
@allow_plugins_option
@threads_option
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: str | None,
    raw: bool,
    system: str | None,
    budget: Budget | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    stats: bool,
    target: str,
    allow_plugins: bool,
    threads: int | None,
) -> None:
    """Generates text: one prompt, or a chat.

    In a chat, a line that ends with a backslash goes on in the next, lines between two of three double quotes are one
    message, and Ctrl-C ends a reply.

    \b
    semkv-deploy generate bundle/ --prompt "Why is the sky blue?" --budget 0.2
    semkv-deploy generate bundle/ --prompt - --stop "###" < question.txt
    """
    from semkv_deploy.cli.chat import read_prompt, run
    from semkv_deploy.runtime.sampling import Sampler

    sampler = Sampler(temperature, top_p, seed, top_k)
    text = read_prompt(prompt, prompt_file)
    if raw and text is None:
        raise SemkvError("needs a prompt", where="--raw", fix="add --prompt")
    run(
        bundle,
        prompt=text,
        raw=raw,
        system=system,
        budget=budget,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        stats=stats,
        target=target,
        allow_plugins=allow_plugins,
        threads=threads,
        stop=stop,
    )

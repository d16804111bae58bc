"""`bench`: time and memory of a bundle's budgets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.options import (
    PATH,
    allow_plugins_option,
    budgets_option,
    bundle_argument,
    json_option,
    target_option,
    threads_option,
)

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget


@click.command()
@bundle_argument
@budgets_option()
@click.option("--context", type=click.IntRange(min=256), help="Tokens of context.  [default: the bundle's max-context]")
@click.option("--tokens", type=click.IntRange(min=4), default=32, show_default=True, help="Tokens decoded and timed.")
@click.option(
    "--turns",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Turns of equal length that the context has; each ends with --tokens decoded.",
)
@click.option("--genai", type=PATH, help="onnxruntime-genai model directory to compare with.")
@click.option("--plot", type=PATH, help="Also draw a picture (needs matplotlib).")
@json_option()
@target_option()
@allow_plugins_option
@threads_option
def bench(
    bundle: Path,
    budgets: list[Budget],
    context: int | None,
    tokens: int,
    turns: int,
    genai: Path | None,
    plot: Path | None,
    as_json: bool,
    target: str,
    allow_plugins: bool,
    threads: int | None,
) -> None:
    """Measures time and memory of every budget.

    Decode, prefill and memory, each budget in a process of its own.

    \b
    semkv-deploy bench bundle/ --genai smollm2-genai/ --json
    semkv-deploy bench bundle/ --turns 8 --context 8192 --tokens 64
    """
    from semkv_deploy.bench import report

    report.run(
        bundle,
        budgets=budgets,
        context=context,
        tokens=tokens,
        turns=turns,
        genai=genai,
        plot=plot,
        as_json=as_json,
        target=target,
        allow_plugins=allow_plugins,
        threads=threads,
    )

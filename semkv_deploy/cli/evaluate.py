"""`evaluate`: KL of methods against the full cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.options import PATH, budgets_option, bundle_argument, json_option

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget


@click.command()
@bundle_argument
@click.option("--text", type=PATH, required=True, help="Text to evaluate on.")
@click.option("--tokens", type=click.IntRange(min=512), default=2048, show_default=True, help="Tokens of it.")
@budgets_option(default=["0.2", "0.5"])
@json_option()
def evaluate(bundle: Path, text: Path, tokens: int, budgets: list[Budget], as_json: bool) -> None:
    """Measures methods in KL against the full cache.

    At equal capacity, each method and its options.

    \b
    semkv-deploy evaluate bundle/ --text moby-dick.txt --budget 0.2
    """
    from semkv_deploy.evaluate import kl

    kl.run(bundle, text=text, tokens=tokens, budgets=budgets, as_json=as_json)

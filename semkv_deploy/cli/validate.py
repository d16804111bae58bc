"""`validate`: a bundle's targets against its portable graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.cli.console import progress
from semkv_deploy.cli.options import (
    PATH,
    allow_plugins_option,
    budgets_option,
    bundle_argument,
    json_option,
    targets_option,
)

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget


@click.command()
@bundle_argument
@budgets_option()
@targets_option("Target to validate")
@click.option(
    "--tokens",
    type=click.IntRange(min=30),
    help="Tokens of a row at most, over three turns.  [default: what overflows the cache, at most 2048]",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=Path("reports"),
    show_default=True,
    help="Directory for validate.json and validate.html; never in the bundle.",
)
@json_option()
@allow_plugins_option
def validate(
    bundle: Path,
    budgets: list[Budget],
    targets: tuple[str, ...],
    tokens: int | None,
    output: Path,
    as_json: bool,
    allow_plugins: bool,
) -> None:
    """Compares each target with the portable graphs.

    Logits, caches, chosen slots and lengths.

    Three turns of prefill, decode and compression. TensorRT's graphs are run in ONNX Runtime. When something differs,
    the first layer that does is named, and the exit code is 1. The report's page ends with command lines that run the
    same files in stock Polygraphy.

    \b
    semkv-deploy validate bundle/ --budget 0.2
    """
    from semkv_deploy.validate import report

    report.run(
        bundle,
        budgets=budgets,
        targets=list(targets),
        tokens=tokens,
        output=output,
        json_only=as_json,
        progress_bar=progress,
        allow_plugins=allow_plugins,
    )

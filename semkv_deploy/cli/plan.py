"""`plan`: memory that a build would need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from semkv_deploy.cli.options import (
    budgets_option,
    cache_dtype_option,
    cache_groups_option,
    dtype_option,
    json_option,
    layout_option,
    max_context_option,
    method_options,
    native_option,
    size_option,
    source_argument,
    target_option,
    weights_option,
)

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget
    from semkv_deploy.methods import AnyMethod


@click.command()
@source_argument
@budgets_option(required=True)
@click.option("--batch", "batches", type=int, multiple=True, default=[1], help="Rows; several times.  [default: 1]")
@max_context_option
@cache_groups_option
@target_option()
@weights_option
@native_option
@cache_dtype_option
@dtype_option
@layout_option
@size_option("--memory", "Memory there is, such as 8GiB: say what fits and the largest context.")
@json_option("Print JSON, with what each number is made of.")
@method_options
def plan(
    source: str,
    budgets: list[Budget],
    batches: tuple[int, ...],
    max_context: int | None,
    cache_groups: str | None,
    target: str,
    weights: Any,
    native: Any,
    cache_dtype: Any,
    dtype: Any,
    layout: Any,
    memory: int | None,
    as_json: bool,
    method: AnyMethod,
) -> None:
    """Says what memory a build would need.

    Before anything is built; no weights are read.

    SOURCE is decoder.onnx of an export, or a directory with config.json.

    \b
    semkv-deploy plan exported/decoder.onnx --budget 0.2 --budget 0.5 --batch 1 --batch 8 --memory 2GiB
    """
    from semkv_deploy.cli import plan_report
    from semkv_deploy.memory.estimate import make_plan

    estimate = make_plan(
        source,
        budgets=budgets,
        method=method,
        batches=batches,
        max_context=max_context,
        cache_groups=cache_groups,
        target=target,
        weights=weights,
        native=native,
        cache_dtype=cache_dtype,
        dtype=dtype,
        layout=layout,
        memory=memory,
    )
    if as_json:
        click.echo(plan_report.as_json(estimate))
    else:
        plan_report.show(estimate)

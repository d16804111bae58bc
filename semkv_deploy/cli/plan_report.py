"""Prints a memory estimate as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from semkv_deploy.cli.console import number_table
from semkv_deploy.memory.estimate import PlanRow
from semkv_deploy.sizes import size
from semkv_deploy.terminal import printable, show_table

if TYPE_CHECKING:
    from semkv_deploy.memory.estimate import Plan

MIB = 1 << 20


def as_json(plan: Plan) -> str:
    """Returns the estimate as JSON, and under `fields` what each number of a row is made of."""
    fields = {name: field.description for name, field in PlanRow.model_fields.items()}
    return json.dumps({**plan.model_dump(), "fields": fields}, indent=1)


def show(plan: Plan) -> None:
    """Prints a table with a column for each budget and batch: parts add up downwards, and many columns still fit."""
    console = Console()
    how = f"{plan.stored_as}, layout {plan.layout}"
    if plan.layout is None:
        how = f"{plan.stored_as} weights, {plan.cache_type} caches" + (", native operators" if plan.native else "")
    console.print(f"[bold]{escape(printable(plan.source))}[/bold]: {plan.family}, {plan.target}, {how}, {plan.method}")
    limit = "" if plan.memory_bytes is None else f", {size(plan.memory_bytes)} of memory"
    console.print(f"{plan.max_context} tokens of context{limit}")
    batched = any(row.batch > 1 for row in plan.rows)
    headings = [f"{row.budget:g}" + (f"\nbatch {row.batch}" if batched else "") for row in plan.rows]
    table = number_table("MiB, by budget", *headings, left=("MiB, by budget",))
    for name, count in _PARTS.items():
        if any(count(row) for row in plan.rows):
            table.add_row(name, *(_mib(count(row)) for row in plan.rows))
    table.add_row("total", *(_mib(row.total_bytes) for row in plan.rows), style="bold")
    if any(row.load_bytes > row.total_bytes for row in plan.rows):
        table.add_row("while loading", *(_mib(row.load_bytes) for row in plan.rows))
    table.add_section()
    table.add_row("total with the full cache", *(_mib(row.full_total_bytes) for row in plan.rows))
    table.add_row("cache read by a decode step", *(_mib(row.read_bytes_per_step) for row in plan.rows))
    table.add_row("full cache / that", *(f"{row.cache_ratio:.2f}" for row in plan.rows))
    table.add_section()
    table.add_row("slots", *(str(row.capacity) for row in plan.rows))
    if plan.memory_bytes is not None:
        table.add_row("fits", *("yes" if row.fits else "no" for row in plan.rows))
        table.add_row("largest context that fits", *(str(row.largest_context or "none") for row in plan.rows))
        table.add_row(
            "largest budget that fits",
            *(f"{row.largest_budget:g}" if row.largest_budget else "none" for row in plan.rows),
        )
    show_table(console, table)
    for note in plan.notes:
        console.print(note, style="dim")
    if plan.memory_bytes is not None and any(row.largest_context == plan.model_max_context for row in plan.rows):
        console.print(f"the model was made for {plan.model_max_context} tokens at most", style="dim")


_PARTS: dict[str, Callable[[PlanRow], int]] = {
    "weights": lambda row: row.weight_bytes,
    "packed weights' sums": lambda row: row.packing_bytes,
    "programs": lambda row: row.program_bytes,
    "keys and values": lambda row: row.cache_bytes,
    "slot biases": lambda row: row.bias_bytes,
    "spare layers": lambda row: row.spare_bytes,
    "activations": lambda row: row.activation_bytes,
    "compressor": lambda row: row.compressor_bytes,
    "host metadata": lambda row: row.metadata_bytes,
    "logits": lambda row: row.io_bytes,
}


def _mib(count: int) -> str:
    return f"{count / MIB:.1f}"

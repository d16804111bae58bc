"""A validation for people: JSON, a page that needs nothing else, a table on the terminal."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.budget_units import BudgetLike
    from semkv_deploy.validate.results import CheckResult, Report
    from semkv_deploy.validate.run import Progress

JSON_FILE, PAGE_FILE = "validate.json", "validate.html"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1.6rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.passed { color: #17692e; } .failed { color: #b3151b; font-weight: 600; } .skipped { color: #6b5900; }
code, pre { font: 13px ui-monospace, monospace; }
pre { white-space: pre-wrap; background: #f5f5f3; padding: .5rem .7rem; }
"""


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Writes `validate.json` and `validate.html` into `folder`; returns their paths.

    Raises:
        SemkvError: when the folder cannot be written to.
    """
    document, page = folder / JSON_FILE, folder / PAGE_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        document.write_text(as_json(report) + "\n", encoding="utf-8")
        page.write_text(as_page(report), encoding="utf-8")
    except OSError as error:
        raise SemkvError(f"cannot be written to: {error.strerror}", where=folder, fix="choose another -o") from None
    return document, page


def as_json(report: Report) -> str:
    """The report and its verdict as JSON; infinite differences are the string "Infinity"."""
    return json.dumps({"passed": report.passed, **json.loads(report.model_dump_json())}, indent=1)


def as_page(report: Report) -> str:
    """The report as one HTML file: a table for each target, what failed and where it began, and the tolerances."""

    def text(value: object) -> str:
        return html.escape(str(value))

    verdict = "passed" if report.passed else "failed"
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>Validation of {text(report.bundle)}: {verdict}</title><style>{_STYLE}</style>",
        f"<h1>Validation of <code>{text(report.bundle)}</code>: <span class='{verdict}'>{verdict}</span></h1>",
        f"<p>{text(report.model)}, {text(report.method)}. Reference: {text(report.reference)}. "
        "Each run is three turns of prefill, decode and compression; decoded tokens are the reference's.</p>",
    ]
    for result in report.results:
        if result.status == "failed":
            parts.append(f"<p><strong class='failed'>Failed</strong>: {text(result.sentence())}.</p>")
    for target in dict.fromkeys(result.target for result in report.results):
        results = [result for result in report.results if result.target == target]
        parts += [f"<h2>{text(target)}</h2><table>", _page_row("th", _HEADINGS)]
        for result in results:
            cells = [f"<td class='number'>{result.budget:g}</td>", f"<td>{text(result.name)}</td>"]
            cells.append(f"<td class='{result.status}'>{result.status}</td>")
            cells += [f"<td class='number'>{text(value)}</td>" for value in _numbers(result)]
            detail = result.detail + (f"; {result.bisection.sentence()}" if result.bisection else "")
            detail += f". Run: {result.ran}" if result.ran else ""
            cells.append(f"<td>{text(detail)}</td>")
            parts.append(f"<tr>{''.join(cells)}</tr>")
        parts.append("</table>")
    parts += ["<h2>Tolerances</h2><table>", _page_row("th", _LIMITS)]
    for name, tolerance in report.tolerances.items():
        share = None if tolerance.exact_slots else tolerance.relative
        limits = (tolerance.logits, tolerance.cache, tolerance.bias, share, tolerance.first_kl, tolerance.kl)
        cells = [name, *("not bounded" if limit is None else f"{limit:g}" for limit in limits), tolerance.why]
        parts.append(_page_row("td", cells))
    parts.append("</table><h2>The same files in stock Polygraphy</h2><p>Run in the bundle's directory:</p>")
    parts += [f"<pre>{text(command)}</pre>" for command in report.polygraphy]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    parts.append(f"<p>Built with {text(versions)}.</p></html>")
    return "\n".join(parts) + "\n"


_HEADINGS = (
    "budget",
    "check",
    "verdict",
    "logits apart",
    "cache apart",
    "slots alike",
    "greedy alike",
    "mean KL",
    "compressions",
    "tokens × rows",
    "detail",
)

_LIMITS = (
    "check",
    "logits",
    "key, value",
    "bias",
    "share of the largest, until compressed",
    "KL until compressed",
    "KL",
    "why",
)


def _page_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _numbers(result: CheckResult) -> list[str]:
    """Cells from "logits apart" to "tokens × rows"; empty where nothing was run."""
    if not result.max_absdiff:
        return [""] * 7
    cache = max(result.max_absdiff.get(kind, 0.0) for kind in ("key", "value"))
    return [
        f"{result.max_absdiff.get('logits', 0.0):.1e}",
        f"{cache:.1e}",
        f"{result.slots_same:.1%}" if result.slots_same is not None else "",
        f"{result.greedy_same}/{result.greedy_total}",
        f"{result.mean_kl:.1e}" if result.mean_kl is not None else "",
        str(result.compressions),
        f"{result.tokens} × {result.batch}",
    ]


def print_table(report: Report) -> None:
    """A table for each target; what was not run, and why, below it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from semkv_deploy.terminal import printable, show_table

    console = Console()
    colours = {"passed": "green", "failed": "red", "skipped": "yellow"}
    for target in dict.fromkeys(result.target for result in report.results):
        table = Table("budget", "check", "verdict", "logits apart", "cache apart", "greedy", title=target)
        notes = []
        for result in report.results:
            if result.target != target:
                continue
            numbers = _numbers(result)
            verdict = f"[{colours[result.status]}]{result.status}[/]"
            table.add_row(
                f"{result.budget:g}", escape(printable(result.name)), verdict, numbers[0], numbers[1], numbers[3]
            )
            if result.status == "skipped" or result.ties:
                notes.append(f"{result.name}, budget {result.budget:g}: {result.detail}")
        show_table(console, table)
        for note in notes:
            console.print(printable(note), markup=False, highlight=False)


def run(
    bundle: Path,
    *,
    budgets: Sequence[BudgetLike],
    targets: list[str],
    tokens: int | None,
    output: Path,
    json_only: bool,
    allow_plugins: bool = False,
    progress_bar: Callable[[], AbstractContextManager[Progress]],
) -> None:
    """The `validate` command: empty `budgets` and `targets` mean all.

    Raises:
        SemkvError: naming the first failure, so that the command ends with exit code 1.
    """
    from semkv_deploy.validate.run import validate

    if output.resolve() == bundle.resolve() or bundle.resolve() in output.resolve().parents:
        raise SemkvError(
            "the report would change the bundle", where=f"-o {output}", expected="a directory outside the bundle"
        )
    with progress_bar() as progress:
        report = validate(
            bundle, budgets=budgets, targets=targets, tokens=tokens, allow_plugins=allow_plugins, progress=progress
        )
    document, page = write(report, output)
    if json_only:
        click.echo(as_json(report))
    else:
        print_table(report)
    click.echo(f"report: {document}, {page}", err=True)
    failed = [result for result in report.results if result.status == "failed"]
    if failed:
        raise SemkvError(f"validation failed: {failed[0].sentence()}", where=bundle)
    if not report.passed:
        raise SemkvError("nothing was compared: the bundle has no target", where=bundle, fix="build it again")

"""The terminal: progress, tables of numbers, the one sentence of an error, and text files that options name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semkv_deploy.errors import SemkvError
from semkv_deploy.terminal import one_line

if TYPE_CHECKING:
    from rich.table import Table


def sentence(error: SemkvError | OSError) -> str:
    """Returns an error as one line without control characters; of an error of the system, the file and the reason."""
    if isinstance(error, SemkvError) or error.strerror is None:
        return one_line(str(error))
    return one_line(f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror)


def internal(error: BaseException) -> str:
    """Returns an error that nobody foresaw as one line, with how to see where it came from."""
    if isinstance(error, MemoryError):
        return "out of memory"
    reason = one_line(str(error)) or "no reason given"
    return f"internal {type(error).__name__}: {reason[:500]}; run with --debug for the traceback"


@contextmanager
def progress() -> Iterator[Callable[[str, float | None], None]]:
    """Shows a bar for each phase on a terminal, prints a line for each elsewhere; both on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        phases: dict[str, Any] = {}

        def report(what: str, share: float | None) -> None:
            if what not in phases:
                for task in phases.values():
                    bar.update(task, total=1, completed=1)
                phases[what] = bar.add_task(what, total=None)
                if not console.is_terminal:
                    click.echo(what, err=True)
            if share is not None:
                bar.update(phases[what], total=1, completed=share)

        yield report
        for task in phases.values():
            bar.update(task, total=1, completed=1)


def number_table(*columns: str, left: Collection[str] = ()) -> Table:
    """Makes a table whose cells do not wrap and are set to the right, but in the columns named in `left`."""
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column in left else "right")
    return table


def read_text(path: Path, option: str) -> str:
    """Reads the UTF-8 text file that `option` names.

    Raises:
        SemkvError: when there is no such file, or it is not UTF-8, with the byte that is not.
    """
    where = f"{option} {path}"
    if not path.is_file():
        raise SemkvError("no such file", where=where)
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SemkvError(
            "not UTF-8 text",
            where=where,
            got=f"byte {content[error.start]:#04x} at offset {error.start}",
            fix="convert the file, or give another",
        ) from None

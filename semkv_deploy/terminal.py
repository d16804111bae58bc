"""What is printed on a terminal: strangers' texts without what could move or hide others, tables of any width."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""Control characters but tab and line feed, marks that reorder text, end lines or show as nothing (joiners, which
emoji and scripts need, excepted), and halves of surrogate pairs."""

LONGEST = 2000
"""Characters of a sentence."""


def printable(text: str) -> str:
    """The text with control characters spelled out, as \\x1b."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """The text on one line, spelled out where it must be, and cut when it is very long."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST else line[:LONGEST] + "…"


_ANY_WIDTH = 10_000


def show_table(console: Console, table: Table) -> None:
    """Prints a table without cutting a word or a number of it."""
    from rich.cells import cell_len
    from rich.measure import Measurement
    from rich.padding import Padding

    # What it takes when nothing limits it: columns that may wrap need their longest word, others the longest cell.
    needed = Measurement.get(console, console.options.update(width=_ANY_WIDTH), table)
    whole = any(column.no_wrap for column in table.columns)
    if (needed.maximum if whole else needed.minimum) <= console.width:
        console.print(table, soft_wrap=False)
        return
    if table.title:
        console.print(table.title, soft_wrap=False)
    terminal = console.width
    for lines in _rows(console, table):
        for number, line in enumerate(lines):
            indent = 2 if number else 0
            # Lines end between words; a word that is longer than the terminal's line is left whole.
            console.width = max(terminal, indent + max(map(cell_len, line.plain.split()), default=0))
            console.print(Padding(line, (0, 0, 0, indent), expand=False), soft_wrap=False)
            console.width = terminal


def _rows(console: Console, table: Table) -> Iterator[list[Text]]:
    """Each row as lines: its first cell, then the others that are not empty behind their column's name."""
    from rich.text import Text

    def text(cell: RenderableType) -> Text:
        return cell if isinstance(cell, Text) else console.render_str(str(cell), highlight=False)

    headers = [text(column.header).plain.replace("\n", ", ") for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        first, *others = map(text, cells)
        lines = [Text.assemble(f"{headers[0]}: ", first) if headers[0] else first]
        lines += [
            Text.assemble(f"{header}: ", cell) for header, cell in zip(headers[1:], others, strict=True) if cell.plain
        ]
        yield lines

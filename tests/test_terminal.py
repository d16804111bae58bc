"""What strangers wrote is spelled out on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from semkv_deploy.cli.console import internal, sentence
from semkv_deploy.errors import SemkvError
from semkv_deploy.terminal import LONGEST, one_line, printable, show_table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 你好 🙂\n\ttab", "plain é 你好 🙂\n\ttab"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x07", "a\\rb\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udcff", "\\udcff"),
        ("\u061ca\u200bb\u2028c\ufeff", "\\u061ca\\u200bb\\u2028c\\ufeff"),
        ("👩\u200d🔬 می\u200cخواهم", "👩\u200d🔬 می\u200cخواهم"),
    ],
)
def test_control_characters_are_spelled_out(text: str, shown: str):
    assert printable(text) == shown


def test_sentences_are_one_line_and_not_endless():
    error = SemkvError("bad\nname", where="\x1b[2J", got="x" * 10_000)
    assert sentence(error).startswith("\\x1b[2J: bad name (got xxx") and len(sentence(error)) == LONGEST + 1
    assert sentence(OSError(2, "No such file", "a\x1bb")) == "a\\x1bb: No such file"
    assert one_line(" a \n b ") == "a b"


def test_errors_that_nobody_foresaw():
    assert internal(KeyError("x")) == "internal KeyError: 'x'; run with --debug for the traceback"
    assert internal(MemoryError()) == "out of memory"
    assert "no reason given" in internal(RuntimeError())


def shown(width: int, *, wrap: bool) -> str:
    """A table of two rows on a terminal of so many columns."""
    console = Console(width=width, file=io.StringIO())
    table = Table("check", "largest difference", "detail", title="a target")
    for column in table.columns:
        column.no_wrap = not wrap
    table.add_row("in place", "1.5e-06", escape("[red] layers.00.self_attn.q_proj"))
    table.add_row("copying", "", "-")
    show_table(console, table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("wrap", [True, False])
def test_a_table_that_fits_is_a_table(wrap: bool):
    assert "│ in place │" in shown(80, wrap=wrap).replace("  ", " ").replace("  ", " ")


@pytest.mark.parametrize("width", [40, 20])
@pytest.mark.parametrize("wrap", [True, False])
def test_a_table_that_does_not_fit_is_lines_with_every_word_whole(wrap: bool, width: int):
    text = shown(width, wrap=wrap)
    assert " ".join(text.split()) == (
        "a target check: in place largest difference: 1.5e-06 detail: [red] layers.00.self_attn.q_proj "
        "check: copying detail: -"
    )
    longest = len("  layers.00.self_attn.q_proj")
    assert all(len(line.rstrip()) <= max(width, longest) for line in text.splitlines())

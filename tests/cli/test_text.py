"""What strangers wrote is spelled out on a terminal."""

from __future__ import annotations

import pytest

from semkv_deploy.cli.console import internal, sentence
from semkv_deploy.cli.text import LONGEST, one_line, printable
from semkv_deploy.errors import SemkvError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 你好 🙂\n\ttab", "plain é 你好 🙂\n\ttab"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x07", "a\\rb\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udcff", "\\udcff"),
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

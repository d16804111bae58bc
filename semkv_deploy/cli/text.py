"""What strangers wrote, made fit for a terminal: names and texts from files may hold control characters."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, marks that reorder text, and halves of surrogate pairs."""

LONGEST = 2000
"""Characters of a sentence."""


def printable(text: str) -> str:
    """The text with control characters spelled out, as \\x1b."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """The text on one line, spelled out where it must be, and cut when it is very long."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST else line[:LONGEST] + "…"

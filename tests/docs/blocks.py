"""Code of the pages in `docs/`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(name: str, language: str = "python") -> list[str]:
    """Blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page(name), re.DOTALL)


def check_quotations(name: str) -> list[str]:
    """Checks that blocks whose first line names a file are in that file; returns the others."""
    others = []
    for block in blocks(name):
        first, _, rest = block.partition("\n")
        if first.startswith("# ") and (ROOT / first[2:]).is_file():
            assert rest.strip("\n") in (ROOT / first[2:]).read_text(encoding="utf-8"), first
        else:
            others.append(block)
    return others

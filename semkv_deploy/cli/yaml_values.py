"""YAML of strangers: recipes and option values, read within limits and without aliases."""

from __future__ import annotations

from typing import Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.terminal import one_line

LONGEST = 1 << 18
"""Characters of a document."""

DEEPEST = 16
"""Lists and mappings inside each other."""


def parse(text: str, where: object) -> Any:
    """The value of a YAML document of plain data.

    Aliases are refused: a few hundred bytes of them stand for gigabytes.

    Raises:
        SemkvError: when the text is no YAML, is too long or too deep, or has aliases.
    """
    import yaml

    if len(text) > LONGEST:
        raise SemkvError("too long", where=where, expected=f"at most {LONGEST} characters", got=len(text))
    try:
        depth = 0
        # Events come one at a time: what is too deep is seen before it is built.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise SemkvError("YAML aliases are not taken", where=where, fix="write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise SemkvError("nested too deeply", where=where, expected=f"at most {DEEPEST} levels")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # ValueError: a date or number that looks like one and is none, such as 2024-99-99.
        raise SemkvError(f"not valid YAML: {one_line(str(error))[:200]}", where=where) from None


def brief(value: object) -> str:
    """A value as an error shows it: its beginning."""
    import reprlib

    shown = reprlib.Repr()
    shown.maxlevel, shown.maxlist, shown.maxdict, shown.maxstring, shown.maxother = 2, 3, 3, 60, 60
    return one_line(shown.repr(value))[:200]

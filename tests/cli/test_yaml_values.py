"""YAML of strangers: limits, and values that only look like ones."""

from __future__ import annotations

import time

import pytest

from semkv_deploy.cli.yaml_values import DEEPEST, LONGEST, brief, parse
from semkv_deploy.errors import SemkvError

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(20)
)


@pytest.mark.parametrize(("text", "value"), [("4", 4), ("0.5", 0.5), ("head", "head"), ("[1, 2]", [1, 2]), ("", None)])
def test_plain_values(text: str, value: object):
    assert parse(text, "x") == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases are not taken"),
        ("<<: *a", "aliases are not taken"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ("- " * 100_000, "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"),
        ("x" * (LONGEST + 1), "too long"),
        ("2024-99-99", "not valid YAML"),
        ("9" * 10_000, "not valid YAML"),
        ("!!python/object/apply:os.system [echo]", "not valid YAML"),
        ("? {a: b}\n: c", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("'\x1b[31m", "not valid YAML"),
    ],
)
def test_what_is_refused(text: str, words: str):
    started = time.monotonic()
    with pytest.raises(SemkvError, match=words) as error:
        parse(text, "--method-option x")
    assert time.monotonic() - started < 5
    assert len(str(error.value)) < 600 and "\x1b" not in str(error.value) and "\n" not in str(error.value)


def test_values_in_errors_are_short():
    assert len(brief([["x" * 1000] * 1000] * 1000)) < 400

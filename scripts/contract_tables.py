"""Writes the tables of `docs/contract.md` from the contract's own models: `python scripts/contract_tables.py`.

A test runs `page` and compares, so that the page cannot lag behind the code.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from semkv_deploy.bundle.contract import Contract

PAGE = Path(__file__).parent.parent / "docs" / "contract.md"
BEGIN, END = "<!-- begin: scripts/contract_tables.py -->", "<!-- end -->"


def page(text: str) -> str:
    """The page's text with its tables made anew."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def tables() -> str:
    """A section for each object of a contract, then the rules."""
    schema = Contract.model_json_schema()
    objects = {"Contract": schema, **{name: schema["$defs"][name] for name in _reached(schema, schema["$defs"])}}
    sections, rules = [], []
    for name, definition in objects.items():
        described = _attributes(definition.get("description", ""))
        rows = []
        for field, of in definition["properties"].items():
            if field.endswith("_rule"):
                rules.append(
                    _wrapped(f"* **{field}**{'' if name == 'Contract' else f' (of {name})'}: {of['default']}.")
                )
                continue
            meaning = of.get("description") or described.get(field, "")
            rows.append(f"| `{field}` | {_type(of)} | {_cell(meaning)} |")
        summary = definition.get("description", "").split("\n\nAttributes:")[0]
        summary = "\n\n".join(_wrapped(paragraph) for paragraph in summary.split("\n\n"))
        sections.append("\n".join([f"### {name}", "", summary, "", "| field | type | |", "|---|---|---|", *rows, ""]))
    return "\n".join([*sections, "### Rules", "", "Each is a field of the contract, as a text:", "", *rules, ""])


def _reached(of: Any, definitions: dict[str, Any], seen: tuple[str, ...] = ()) -> list[str]:
    """Names of the objects that a schema refers to, in the order of its fields, each once."""
    found: list[str] = []
    for name in _references(of.get("properties", {})):
        if name not in (*seen, *found) and definitions[name].get("type") == "object":
            found.append(name)
            found += [n for n in _reached(definitions[name], definitions, (*seen, *found)) if n not in found]
    return found


def _references(of: Any) -> Iterator[str]:
    if isinstance(of, dict):
        if "$ref" in of:
            yield of["$ref"].rsplit("/", 1)[1]
        for key, value in of.items():
            if key != "discriminator":
                yield from _references(value)
    elif isinstance(of, list):
        for value in of:
            yield from _references(value)


def _attributes(docstring: str) -> dict[str, str]:
    """What a docstring's `Attributes:` say of each field."""
    _, _, text = docstring.partition("Attributes:\n")
    found = {}
    for entry in re.split(r"\n(?=    \S)", text.rstrip()):
        names, _, meaning = entry.strip().partition(": ")
        for name in names.split(", "):
            found[name] = " ".join(meaning.split())
    return found


def _type(of: dict[str, Any]) -> str:
    """A field's type in words."""
    if "$ref" in of:
        name = of["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in of:
            return " or ".join(dict.fromkeys(_type(each) for each in of[key]))
    if "const" in of:
        return f"`{of['const']}`"
    if "enum" in of:
        return " or ".join(f"`{value}`" for value in of["enum"])
    if of.get("type") == "array":
        if "prefixItems" in of:
            return f"[{', '.join(_type(each) for each in of['prefixItems'])}]"
        return f"list of {_type(of['items'])}" if "items" in of else "list"
    if of.get("type") == "object":
        return f"object of {_type(of['additionalProperties'])}"
    return str(of.get("type", "any"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").rstrip(".")


def _wrapped(text: str) -> str:
    indent = "  " if text.startswith("* ") else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

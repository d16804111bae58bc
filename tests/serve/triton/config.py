"""Reads config.pbtxt as far as the repository writes it: protobuf's text format, into what Triton gives as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s\[\]{}:,"#]+|#[^\n]*')


def parse(text: str) -> dict[str, Any]:
    tokens = [token for token in _TOKEN.findall(text) if not token.startswith("#")]
    config = _message(iter([*tokens, "}"]))
    config["parameters"] = {each["key"]: each["value"] for each in config["parameters"]}
    return config


def _message(tokens: Iterator[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in tokens:
        if name == "}":
            return fields
        if name == ",":
            continue
        token = next(tokens)
        value = _value(tokens, next(tokens) if token == ":" else token)
        if name == "parameters":
            fields.setdefault(name, []).append(value)
        else:
            assert name not in fields, name
            fields[name] = value
    raise AssertionError("ends in the middle")


def _value(tokens: Iterator[str], token: str) -> Any:
    if token == "{":
        return _message(tokens)
    if token == "[":
        values = []
        for token in tokens:
            if token == "]":
                return values
            if token != ",":
                values.append(_value(tokens, token))
    if token.startswith('"'):
        return json.loads(token)
    return {"true": True, "false": False}.get(token, int(token) if re.fullmatch(r"-?\d+", token) else token)

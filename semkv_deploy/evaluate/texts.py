"""Corpora: what `scripts/fetch.py` has put into the cache, or files of the user's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import ChatTemplate

CORPORA = {"prose": "prose.txt", "code": "code.txt", "chat": "chat.jsonl"}
"""Corpora by name, and their files in the cache."""


class Corpus(NamedTuple):
    """A text as token ids, and what it was made from."""

    tokens: list[int]
    sha256: str


def cache_folder() -> Path:
    """`$SEMKV_DEPLOY_CACHE`, else `semkv-deploy` in the user's cache: where `scripts/fetch.py` puts files."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SEMKV_DEPLOY_CACHE") or Path(base) / "semkv-deploy")


def load_corpora(names: Iterable[str], given: Mapping[str, Path], tokenizer: Any) -> dict[str, Corpus]:
    """Corpora by name, as token ids.

    Args:
        given: files that stand for a corpus: UTF-8 text, or `.jsonl` of dialogues (`{"messages": […]}` a line), which
            become one conversation in the tokenizer's chat template.

    Raises:
        SemkvError: when a file is missing, or is not what its name says.
    """
    return {name: _load(name, given.get(name), tokenizer) for name in dict.fromkeys(names)}


def load_records(names: Iterable[str], given: Mapping[str, Path]) -> dict[str, list[Any]]:
    """Rows of JSON lines files that the user gives.

    Raises:
        SemkvError: when a file is not given, or has a line that is not JSON.
    """
    records: dict[str, list[Any]] = {}
    for name in dict.fromkeys(names):
        if name not in given:
            raise SemkvError("no data for the task", where=f"--task {name}", fix=f"give --text {name}=FILE")
        content, where = read_bytes(given[name], f"--text {name}={given[name]}", None), f"--text {name}"
        records[name] = []
        for number, line in enumerate(filter(str.strip, content.decode("utf-8-sig").splitlines()), 1):
            try:
                records[name].append(json.loads(line))
            except ValueError as error:
                raise SemkvError("not JSON", where=f"{where}, line {number}", got=error) from None
    return records


def _load(name: str, given: Path | None, tokenizer: Any) -> Corpus:
    path = given if given is not None else cache_folder() / CORPORA[name]
    where = f"--text {name}={path}" if given is not None else f"text {name}"
    fetch = f"fetch it with: python scripts/fetch.py {name}; or give your own with --text {name}=FILE"
    content = read_bytes(path, where, None if given else fetch)
    text = content.decode("utf-8-sig")
    if path.suffix == ".jsonl":
        text = conversation(text, tokenizer, where)
    return Corpus(tokenizer.encode(text, add_special_tokens=False), hashlib.sha256(content).hexdigest())


def read_bytes(path: Path, where: str, missing: str | None = None) -> bytes:
    """Bytes of a file of UTF-8 text.

    Args:
        missing: what to do where there is none.

    Raises:
        SemkvError: naming `where`, when there is none, or it is not UTF-8.
    """
    try:
        content = path.read_bytes()
        content.decode("utf-8-sig")
    except FileNotFoundError:
        raise SemkvError("no such file", where=where, fix=missing) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SemkvError(f"cannot be read as UTF-8 text: {error}", where=where) from None
    return content


def conversation(lines: str, tokenizer: Any, where: str) -> str:
    """Dialogues as one conversation: in the tokenizer's chat template, or with the roles written out."""
    messages: list[dict[str, str]] = []
    for number, line in enumerate(filter(str.strip, lines.splitlines()), 1):
        try:
            messages += [{"role": each["role"], "content": each["content"]} for each in json.loads(line)["messages"]]
        except (ValueError, KeyError, TypeError) as error:
            expected = '{"messages": [{"role": …, "content": …}, …]}'
            raise SemkvError("no dialogue", where=f"{where}, line {number}", expected=expected, got=error) from None
    template = ChatTemplate.of(tokenizer)
    if template is None:
        return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
    return template.render(messages, add_generation_prompt=False)

"""A tokenizer from files that somebody else wrote: read as data, its code never run, no hub asked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semkv_deploy.errors import SemkvError

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""For every call of transformers that loads something: Python code that comes with a model is never run.

Said outright, because transformers asks on the terminal where it is left open, and an answer may be waiting there.
"""

LOCAL: dict[str, Any] = {**NO_CODE, "local_files_only": True}
"""The same, for folders: what their files name is not looked up on a hub."""


@contextmanager
def no_hub() -> Iterator[None]:
    """Makes every request to a hub fail, also one of a package that transformers calls because a file says so."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_tokenizer(folder: Path, where: object = None) -> Any:
    """The tokenizer in a folder, chat template included.

    Args:
        where: how an error names the folder, if not by its path.

    Raises:
        SemkvError: when there is none, it needs code of its own, or it names files outside its folder.
    """
    check_tokenizer_config(folder, where)
    from transformers import AutoTokenizer

    try:
        with no_hub():
            return AutoTokenizer.from_pretrained(str(folder), **LOCAL)
    except BaseException as error:
        if not loading_failed(error):
            raise
        raise cannot_load("the tokenizer", folder if where is None else where, error) from error


def check_tokenizer_config(folder: Path, where: object = None) -> None:
    """Fails where `tokenizer_config.json` names a file of this machine: some transformers would open it.

    A path that only its author's machine has, which old versions wrote, is let pass.

    Raises:
        SemkvError: naming the key.
    """
    path = folder / "tokenizer_config.json"
    shown = path if where is None else f"{where}/{path.name}"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SemkvError("not valid JSON", where=shown, got=error) from None
    if not isinstance(config, dict):
        raise SemkvError("not a tokenizer's configuration", where=shown, expected="a mapping")
    versions = config.get("fast_tokenizer_files")
    named = [(key, value) for key, value in config.items() if key.endswith("_file")]
    named += [("fast_tokenizer_files", value) for value in (versions if isinstance(versions, list) else [])]
    for key, value in named:
        if isinstance(value, str) and ("/" in value or "\\" in value) and os.path.lexists(folder / value):
            raise SemkvError("names a file outside its folder", where=f"{shown}: {key}", got=repr(value))


def loading_failed(error: BaseException) -> bool:
    """Whether it is a failure and no interrupt: a Rust library's panic is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def cannot_load(what: str, where: object, error: BaseException) -> SemkvError:
    """One sentence for whatever transformers raised while it loaded something."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return SemkvError(
            f"{what} needs Python code that comes with it, and such code is never run",
            where=where,
            expected="an architecture and a tokenizer that transformers has itself",
            fix="remove auto_map from its configuration if transformers knows the model without",
        )
    return SemkvError(
        f"{what} cannot be loaded",
        where=where,
        got=f"{type(error).__name__}: {reason[:200]}",
        fix="check that its files are complete and that the architecture is a decoder transformers knows",
    )

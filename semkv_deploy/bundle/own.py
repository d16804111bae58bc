"""What this tool wrote: which directories `--force` may replace, because all in them is a bundle's or an export's."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from semkv_deploy.model.exported import DECODER, EXPORT_FILES, FACTS, TOKENIZER, is_tokenizer_file

MANIFEST = "bundle.json"
MANIFEST_LIMIT = 1 << 28
"""Bytes: more is no manifest."""

BUNDLE_FOLDERS = ("onnx/", "targets/", "tokenizer/", "reports/")
BUNDLE_FILES = ("delimiters.json",)


def entries(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Names below `root`, relative and with slashes, links not followed: all but directories that hold something."""
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as scan:
            found = sorted(scan, key=lambda entry: entry.name)
        if folder and not found:
            yield folder, (root / folder).lstat()
        for entry in found:
            name = f"{folder}{entry.name}"
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                pending.append(f"{name}/")
            else:
                yield name, status


def foreign(root: Path) -> str | None:
    """The first thing in a directory that no bundle or export of this tool has there; None: there is none."""
    names = []
    for name, status in entries(root):
        if not stat.S_ISREG(status.st_mode):
            return name
        names.append(name)
    written: set[str] = set()
    if MANIFEST in names:
        written = _files_of_bundle(root / MANIFEST)
    elif DECODER in names and _is_facts(root / FACTS):
        folder = f"{TOKENIZER}/"
        tokenizer = (name for name in names if name.startswith(folder) and is_tokenizer_file(name.removeprefix(folder)))
        written = {*EXPORT_FILES, *tokenizer}
    return next((name for name in names if name not in written), None)


def _files_of_bundle(manifest: Path) -> set[str]:
    """Files that a manifest lists, where a bundle has files."""
    raw = _json(manifest)
    if not isinstance(raw, dict) or not isinstance(raw.get("schema_version"), int) or "targets" not in raw:
        return set()
    files = raw.get("files")
    listed = files if isinstance(files, dict) else {}
    return {MANIFEST, *(name for name in listed if name in BUNDLE_FILES or name.startswith(BUNDLE_FOLDERS))}


def _is_facts(path: Path) -> bool:
    raw = _json(path)
    return isinstance(raw, dict) and {"family", "layers", "kv_heads", "vocab_size"} <= raw.keys()


def _json(path: Path) -> object:
    try:
        if path.stat().st_size > MANIFEST_LIMIT:
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None

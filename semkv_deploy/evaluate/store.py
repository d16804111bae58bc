"""Results on disk: a JSON file for each cell, under a name that is a hash of everything that decides what is in it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.entries import Entry

CELLS, REFERENCES, WORK = "cells", "references", "work"
"""Folders of a results folder: results; what the full cache said; the export, which can be made again."""


def digest(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@functools.cache
def code_digest(*places: str) -> str:
    """SHA-256 of the package's own files in these folders, so that results of other code are other cells.

    Once for a process: what runs is the code that was there when it began.
    """
    root = Path(__file__).parent.parent
    total = hashlib.sha256()
    for place in places:
        base = root / place
        for path in sorted(base.rglob("*.py")) if base.is_dir() else [base]:
            total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def files_digest(source: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names; of what is not there, that of nothing."""
    paths = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one task.

    Attributes:
        budget: share kept; 1 for the ends of the scale.
        facts: everything that decides the numbers; the name of the cell's file is their hash.
    """

    entry: Entry
    budget: float
    task: str
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the cell's file, without its ending."""
        return digest({"budget": self.budget, "task": self.task, **self.facts})[:32]


class Store:
    """A results folder.

    Raises:
        SemkvError: when it cannot be written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            (root / CELLS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SemkvError(f"cannot be written to: {error.strerror}", where=root) from None

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's result; None: it was not measured, or its file is damaged."""
        try:
            result = json.loads((self.root / CELLS / f"{cell.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return result if isinstance(result, dict) and "rows" in result else None

    def write(self, cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a cell's result, whole or not at all, and returns it as it will be read."""
        whole = {
            "method": cell.entry.text,
            "budget": cell.budget,
            "task": cell.task,
            "facts": dict(cell.facts),
            **result,
        }
        path = self.root / CELLS / f"{cell.name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(whole, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, path)
        return whole

    def _references(self, full: Cell) -> Path:
        return self.root / REFERENCES / full.name

    def has_references(self, full: Cell, count: int) -> bool:
        """Whether what the full cache said of all examples of a task is here."""
        return all((self._references(full) / f"{number}.npy").is_file() for number in range(count))

    def write_reference(self, full: Cell, number: int, array: NDArray[Any]) -> None:
        """Keeps what the full cache said of an example, on disk: logits of a task are larger than the model."""
        folder = self._references(full)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{number}.partial.npy"
        np.save(partial, array)
        os.replace(partial, folder / f"{number}.npy")

    def reference(self, full: Cell, number: int) -> NDArray[Any]:
        """What the full cache said of an example; read from disk as it is used."""
        array: NDArray[Any] = np.load(self._references(full) / f"{number}.npy", mmap_mode="r")
        return array

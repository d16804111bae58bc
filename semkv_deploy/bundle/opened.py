"""One budget of an opened bundle: its contract, and the files that the contract names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.bundle.contract import Contract
from semkv_deploy.bundle.graphs import LoadedGraph, load_graph
from semkv_deploy.model.delimiters import Delimiters

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from semkv_deploy.bundle.files import BundleFiles


@dataclass(frozen=True)
class OpenedBudget:
    """A contract and the directory that its files are relative to.

    Attributes:
        fingerprint: SHA-256 of the manifest; saved sessions belong to a bundle by it.
        plugins: operators that are plugins in the engines.
        compute_capabilities: the GPUs that engines are for.
        files: the bundle's, verified as they are read; None: the contract is of files that this process wrote.
        allow_plugins: the caller lets native code of plugins in the engines run.
    """

    root: Path
    contract: Contract
    fingerprint: str = ""
    plugins: tuple[str, ...] = ()
    compute_capabilities: tuple[int, ...] = ()
    files: BundleFiles | None = None
    allow_plugins: bool = False

    def path(self, file: str) -> Path:
        """The path of a file that the contract names."""
        return self.root / file

    def graph(self, file: str) -> Path | LoadedGraph:
        """A graph to run: of a bundle its verified bytes and weights, else the path of a file of our own.

        Raises:
            SemkvError: when it was altered since the bundle was opened.
        """
        # Manifests have relative paths only: an absolute one is of a graph that was rewritten by this process.
        if self.files is None or Path(file).is_absolute():
            return self.path(file)
        return load_graph(self.files, file)

    def read(self, file: str) -> bytes:
        """Bytes of a file that the contract names, verified where it is a bundle's.

        Raises:
            SemkvError: when it was altered since the bundle was opened.
        """
        return self.path(file).read_bytes() if self.files is None else self.files.read(file)

    @cached_property
    def is_delimiter(self) -> NDArray[np.bool_]:
        """`[vocab]` bool, true for delimiters.

        Raises:
            SemkvError: when the file of delimiters is missing or malformed.
        """
        path = self.path(self.contract.delimiters)
        return Delimiters.parse(self.read(self.contract.delimiters), path).table(self.contract.vocab_size)

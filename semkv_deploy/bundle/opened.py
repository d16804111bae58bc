"""One budget of an opened bundle: its contract, and the files that the contract names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.bundle.contract import Contract
from semkv_deploy.model.delimiters import Delimiters

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class OpenedBudget:
    """A contract and the directory that its files are relative to.

    Attributes:
        fingerprint: SHA-256 of the manifest; saved sessions belong to a bundle by it.
        plugins: operators that are plugins in the engines.
        compute_capabilities: the GPUs that engines are for.
    """

    root: Path
    contract: Contract
    fingerprint: str = ""
    plugins: tuple[str, ...] = ()
    compute_capabilities: tuple[int, ...] = ()

    def path(self, file: str) -> Path:
        """The path of a file that the contract names."""
        return self.root / file

    @cached_property
    def is_delimiter(self) -> NDArray[np.bool_]:
        """`[vocab]` bool, true for delimiters.

        Raises:
            SemkvError: when the file of delimiters is missing or malformed.
        """
        return Delimiters.read(self.path(self.contract.delimiters)).table(self.contract.vocab_size)

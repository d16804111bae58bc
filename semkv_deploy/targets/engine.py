"""What a session needs of a target: buffers by name, and programs that read and write them.

An engine allocates what its contract says, binds buffers by the names that the contract's programs give, and runs one
program at a time. It knows no method and no behaviour; those are the session's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from semkv_deploy.bundle.contract import Contract, GraphContract, TensorContract
    from semkv_deploy.bundle.opened import OpenedBudget

Array = NDArray[Any]
Feeds = Mapping[str, Array]
"""Inputs by name; a program takes those that it has."""


class Engine(Protocol):
    """One budget's buffers for some rows, and the programs that work on them.

    Attributes:
        opened: the contract, and the bundle's files.
        batch: rows.
    """

    opened: OpenedBudget
    batch: int

    @property
    def contract(self) -> Contract:
        """The contract that the engine follows."""

    def run(self, program: str, feeds: Feeds, *, row: int | None = None) -> dict[str, Array]:
        """Runs a program of scope "cache".

        Args:
            feeds: the inputs that are no buffers, `[n,…]` (`length` `[groups,n]`).
            row: the batch row whose slices of the buffers are bound, n = 1; None: all rows.

        Returns:
            The outputs that are no buffers, by name; valid until the next call.
        """

    def run_groups(self, program: str, feeds: Mapping[int, Feeds]) -> dict[int, dict[str, Array]]:
        """Runs a program of scope "group" for some groups; others keep their buffers.

        Args:
            feeds: by group number, the inputs that are no buffers.

        Returns:
            By group number, the outputs that are no buffers.
        """

    def read(self, buffer: str, group: int) -> Array:
        """A group's buffer, in the shape that the layout says (bfloat16 as float32); not to be written to."""

    def write(self, buffer: str, group: int, array: Array) -> None:
        """Fills a group's buffer from an array of its shape."""

    def reset(self, row: int | None = None) -> None:
        """Clears what a new conversation needs cleared (what is said of slots), of one row or of all."""

    def cache_bytes(self) -> int:
        """Bytes of all buffers, spare ones included."""


@runtime_checkable
class RunsSomeRows(Protocol):
    """An engine whose steps may leave rows at both ends of the batch out: of a contract without a fixed batch."""

    def run_rows(self, program: str, feeds: Feeds, first: int) -> dict[str, Array]:
        """Runs one token in each of n rows.

        Args:
            feeds: as `Engine.run`'s, of these rows.
            first: the rows are `first` to `first + n - 1`.

        Returns:
            As `Engine.run`, of these rows.
        """


NUMPY_TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "int64": np.int64}


def run_sizes(feeds: Feeds) -> dict[str, int]:
    """Sizes of a decoder run by the symbols of its inputs' shapes."""
    rows, tokens = feeds["input_ids"].shape
    return {"batch": rows, "sequence": tokens, "rows": feeds["logits_index"].shape[1]}


def shape_of(tensor: TensorContract, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape in numbers.

    Raises:
        KeyError: when a symbol is not among the sizes.
    """
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def graph_for(graphs: tuple[GraphContract, ...], *, prompt: bool) -> GraphContract:
    """The decoder graph for prompts or for steps: the one that is for nothing else, or the one for both."""
    wanted = "prefill" if prompt else "decode"
    return next((graph for graph in graphs if graph.phase == wanted), graphs[0])

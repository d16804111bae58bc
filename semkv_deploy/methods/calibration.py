"""What a method sees of a text that it is calibrated on, and what it makes of it. No target is known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from semkv_deploy.methods.dd_select import DelimiterTable, DomainText
    from semkv_deploy.model.cache_groups import CacheGroup

RunGraph = Callable[["onnx.ModelProto", Mapping[str, "NDArray[Any]"]], "dict[str, NDArray[Any]]"]
"""Runs a portable graph once: inputs by name to outputs by name."""


class Settings(BaseModel):
    """What calibration gave; the manifest keeps it. A method that is calibrated has a subclass of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Reading(NamedTuple):
    """A text that the uncompressed model has read, and read again with the first reading in its cache.

    Attributes:
        keys, values: by layer, `[H,n,D]`: of the first reading.
        attention: by layer, `[H,n]`: the largest softmax weight that any token of the second reading, in any query head
            of the KV head, gives a slot of the first.
    """

    keys: list[NDArray[Any]]
    values: list[NDArray[Any]]
    attention: list[NDArray[np.float32]]


class CalibrationText(NamedTuple):
    """A text that the uncompressed model has read.

    Attributes:
        chunk: `[n]` the tokens' `slot_chunk`.
        groups: the cache's groups, each as large as the text at least.
        read: (buffer, group) -> its contents, one row: `[1,H,C,D]`, live up to n.
        run: runs a graph.
        progress: called with the share that is done.
        readings: texts that were read again, where the method learns from them; the first is this text's beginning.
        domains: texts of several domains with the model's queries, where the method learns from them.
        known: what was learned from such texts before; they are not read then.
    """

    chunk: NDArray[np.int64]
    groups: tuple[CacheGroup, ...]
    read: Callable[[str, int], NDArray[Any]]
    run: RunGraph
    progress: Callable[[float], None]
    readings: Sequence[Reading] = ()
    domains: Sequence[DomainText] = ()
    known: DelimiterTable | None = None

"""What behaviours that cut text into blocks save of it, restore and forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from semkv_deploy.model.blocks import TURN, Segmenter, SegmenterState

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.model.blocks import BlockRule


def forgotten(segmenters: Sequence[Segmenter], rows: NDArray[np.bool_]) -> None:
    """Begins these rows anew."""
    for row in map(int, np.flatnonzero(rows)):
        segmenter = segmenters[row]
        segmenter.restore(SegmenterState((), (0,) * len(segmenter.rule.domains), 0))


def saved(segmenters: Sequence[Segmenter], rule: BlockRule) -> dict[str, NDArray[np.int64]]:
    """`open` `[B,longest]`: codes of the open block's tokens, at least `TURN`, then less; `sums` `[B,domains]`;
    `closed` `[B]`."""
    codes = np.full((len(segmenters), rule.longest), TURN - 1, np.int64)
    for number, segmenter in enumerate(segmenters):
        codes[number, : len(segmenter.open)] = segmenter.open
    sums = np.array([segmenter.sums for segmenter in segmenters], np.int64)
    return {"open": codes, "sums": sums, "closed": np.array([each.closed for each in segmenters], np.int64)}


def restored(segmenters: Sequence[Segmenter], rule: BlockRule, state: dict[str, NDArray[np.int64]]) -> None:
    """Takes over what `saved` gave."""
    most = len(rule.token_ids)
    for number, segmenter in enumerate(segmenters):
        # A file that says otherwise was not saved by a session: what no block can be is not taken.
        codes = state["open"][number, : rule.longest - 1].tolist()
        held = next((n for n, code in enumerate(codes) if not TURN <= code <= most), len(codes))
        sums = tuple(state["sums"][number].tolist())
        segmenter.restore(SegmenterState(tuple(codes[:held]), sums, int(state["closed"][number])))

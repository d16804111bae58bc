"""Runs an imported graph beside its original in ONNX Runtime: the same logits, or there is no import.

The original keeps its cache its own way, the import has a full one. Rows: a prompt, a piece on top of it, single
tokens; then two rows at once, a prompt and single tokens (GroupQueryAttention takes no piece on a past in several
rows); then tokens far from the first, on caches of random numbers: what a window hides and how late positions are
turned shows there.
The numbers have the mean and deviation that each channel has in the model's own slots. Plain normal ones ask a deep
model what it was never asked: a last bit of SmolLM2-135M's caches then moves its logits by 8e-5 of the largest, and by
1.4e-6 as they are here, where one other slot in 1,500 moves them by 1e-3.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.imported import Imported
from semkv_deploy.export.foreign.original import Caches, Names, Original

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.model.config import ModelFacts

TOLERANCE = 1e-4
"""Largest difference allowed, as a part of the largest logit: float32 in another order, over the depth of a model."""

FLOAT16_TOLERANCE = 3e-2
"""The same between a graph in float16 and itself in float32. Each of some 20 nodes a layer rounds by up to 4.9e-4 of a
value, and what is rounded in one layer goes through all others. What is asked here is only whether types alone were
changed; whether attention was recognised is asked of the float32 graph, at the other tolerance."""

_CAPACITY = 64
_PIECES = {1: (13, 5, 1, 1, 1), 2: (9, 1, 1)}
"""Tokens of each run, by batch."""

_LATE, _LATE_PIECES = 1500, (3, 1)
"""Slots before the late runs at most, and their tokens."""


def check_import(original: Path, imported: Path, model: ModelFacts, names: Names) -> float:
    """Compares the two graphs; returns the largest difference, as a part of the largest logit.

    Raises:
        SemkvError: naming the run, the row and the layer's cache that differ first.
    """
    theirs = Original(original, names, min(_LATE, model.max_position) + _CAPACITY)
    return _compared(theirs, Imported(imported, model, names), model, TOLERANCE, "the import is not the original")


def check_widened(original: Path, widened: Path, model: ModelFacts, names: Names) -> float:
    """Compares a graph in float16 with itself in float32; returns the largest difference likewise.

    Raises:
        SemkvError: naming the run, the row and the layer's cache that differ first.
    """
    room = min(_LATE, model.max_position) + _CAPACITY
    theirs, wide = Original(original, names, room), Original(widened, names, room)
    what = "the graph in float32 is not what it was in float16"
    return _compared(theirs, wide, model, FLOAT16_TOLERANCE, what)


def _compared(theirs: Original, ours: Original | Imported, model: ModelFacts, tolerance: float, what: str) -> float:
    random = np.random.default_rng(0)
    worst = 0.0
    late = min(_LATE, min(model.max_position, theirs.room) - sum(_LATE_PIECES))
    own: Caches = {}
    for batch, position, pieces in (
        *((batch, 0, pieces) for batch, pieces in _PIECES.items()),
        (1, late, _LATE_PIECES),
    ):
        caches = _grown(model, theirs.names, batch, position, random, own)
        mine = dict(caches)
        for number, count in enumerate(pieces):
            tokens = random.integers(0, model.vocab_size, (batch, count))
            where = f"batch {batch}, run {number + 1} ({count} tokens at position {position})"
            expected, got = theirs.run(caches, tokens, position), ours.run(mine, tokens, position)
            position += count
            for layer, pasts in enumerate(theirs.names.pasts):
                for name in pasts[:2]:
                    _compare(caches[name], mine[name], tolerance, what, f"{where}, layer {layer}: {name}")
            worst = max(worst, _compare(expected, got, tolerance, what, f"{where}: logits"))
        own = own or caches
    return worst


def _grown(
    model: ModelFacts,
    names: Names,
    batch: int,
    slots: int,
    random: np.random.Generator,
    own: Caches,
) -> Caches:
    """Caches of random numbers, distributed as those that the model made itself, `own`; without slots: empty ones."""
    shape = (batch, model.kv_heads, slots, model.head_dim)
    caches = {}
    for name in names.inputs:
        caches[name] = np.zeros(shape, np.float32)
        if slots:
            mean, deviation = (statistic(own[name], axis=2, keepdims=True) for statistic in (np.mean, np.std))
            caches[name] += mean + deviation * random.standard_normal(shape).astype(np.float32)
    return caches


def _compare(expected: NDArray[Any], got: NDArray[Any], tolerance: float, what: str, where: str) -> float:
    if expected.shape != got.shape:
        raise SemkvError(what, where=where, expected=expected.shape, got=got.shape)
    if not np.isfinite(expected).all():
        raise SemkvError(
            "the original's numbers are not finite",
            where=where,
            fix="float16 overflows in some models: export it in float32, or compare nothing: --no-import-check",
        )
    scale = max(float(np.abs(expected).max(initial=0)), 1e-6)
    difference = float(np.abs(expected - got).max(initial=0)) / scale
    if not difference <= tolerance:
        raise SemkvError(
            what,
            where=where,
            expected=f"differences up to {tolerance:g} of the largest value",
            got=f"{difference:.3g}",
            fix="report it with the graph; export the checkpoint itself: semkv-deploy export <checkpoint> -o <dir>",
        )
    return difference

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
from semkv_deploy.export.foreign.original import Names, Original, open_session, outputs
from semkv_deploy.model.names import LENGTH, LOGITS, LOGITS_INDEX, cache_names, present_names

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from semkv_deploy.model.config import ModelFacts

TOLERANCE = 1e-4
"""Largest difference allowed, as a part of the largest logit: float32 in another order, over the depth of a model."""

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
    ours = open_session(imported)
    random = np.random.default_rng(0)
    worst = 0.0
    late = min(_LATE, min(model.max_position, theirs.room) - sum(_LATE_PIECES))
    own: dict[str, NDArray[Any]] = {}
    for batch, position, pieces in (
        *((batch, 0, pieces) for batch, pieces in _PIECES.items()),
        (1, late, _LATE_PIECES),
    ):
        grown = _grown(model, names, batch, position, random, own)
        full = _full(model, batch, position + _CAPACITY)
        for layer in range(model.layers):
            for name, grows in zip(cache_names(layer, model.layers)[:2], names.pasts[layer][:2], strict=True):
                full[name][:, :, :position] = grown[grows]
        for number, count in enumerate(pieces):
            tokens = random.integers(0, model.vocab_size, (batch, count))
            where = f"batch {batch}, run {number + 1} ({count} tokens at position {position})"
            expected = theirs.run(grown, tokens, position)
            got = _run_ours(ours, full, tokens, position, model)
            position += count
            for layer in range(model.layers):
                for name, grows in zip(cache_names(layer, model.layers)[:2], names.pasts[layer][:2], strict=True):
                    live = full[name][:, :, :position]
                    _compare(grown[grows], live, f"{where}, layer {layer}: {grows}")
            worst = max(worst, _compare(expected, got, f"{where}: logits"))
        own = own or grown
    return worst


def _grown(
    model: ModelFacts,
    names: Names,
    batch: int,
    slots: int,
    random: np.random.Generator,
    own: dict[str, NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    """Caches of random numbers, distributed as those that the model made itself, `own`; without slots: empty ones."""
    shape = (batch, model.kv_heads, slots, model.head_dim)
    caches = {}
    for name in names.inputs:
        caches[name] = np.zeros(shape, np.float32)
        if slots:
            mean, deviation = (statistic(own[name], axis=2, keepdims=True) for statistic in (np.mean, np.std))
            caches[name] += mean + deviation * random.standard_normal(shape).astype(np.float32)
    return caches


def _full(model: ModelFacts, batch: int, capacity: int) -> dict[str, NDArray[Any]]:
    shape = (batch, model.kv_heads, capacity, model.head_dim)
    caches: dict[str, NDArray[Any]] = {}
    for layer in range(model.layers):
        key, value, bias = cache_names(layer, model.layers)
        caches |= {
            key: np.zeros(shape, np.float32),
            value: np.zeros(shape, np.float32),
            bias: np.zeros(shape[:3], np.float32),
        }
    return caches


def _run_ours(
    session: onnxruntime.InferenceSession,
    caches: dict[str, NDArray[Any]],
    tokens: NDArray[Any],
    position: int,
    model: ModelFacts,
) -> NDArray[Any]:
    batch, count = tokens.shape
    rows = np.tile(np.arange(count), (batch, 1))
    feeds = {
        "input_ids": tokens,
        "position_ids": rows + position,
        LOGITS_INDEX: rows,
        LENGTH: np.full((model.layers, batch), position),
        **caches,
    }
    wanted = {value.name for value in session.get_inputs()}
    names = [LOGITS, *(name for layer in range(model.layers) for name in present_names(layer, model.layers))]
    found = outputs(session, names, {name: value for name, value in feeds.items() if name in wanted}, "the import")
    for layer in range(model.layers):
        key, value, _ = cache_names(layer, model.layers)
        caches[key], caches[value] = found[1 + 2 * layer], found[2 + 2 * layer]
    return found[0]


def _compare(expected: NDArray[Any], got: NDArray[Any], where: str) -> float:
    if expected.shape != got.shape:
        raise SemkvError("the import is not the original", where=where, expected=expected.shape, got=got.shape)
    if not np.isfinite(expected).all():
        raise SemkvError("the original's numbers are not finite", where=where)
    scale = max(float(np.abs(expected).max(initial=0)), 1e-6)
    difference = float(np.abs(expected - got).max(initial=0)) / scale
    if not difference <= TOLERANCE:
        raise SemkvError(
            "the import is not the original",
            where=where,
            expected=f"differences up to {TOLERANCE:g} of the largest value",
            got=f"{difference:.3g}",
            fix="report it with the graph; export the checkpoint itself: semkv-deploy export <checkpoint> -o <dir>",
        )
    return difference

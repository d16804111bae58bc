"""What masks mean: causal, with or without a sliding window, and nothing else.

A mask has many spellings and one meaning. What is asked is therefore not how its nodes stand but what they give, at
lengths that tell a causal mask from a windowed one and from any other.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.decomposed import Decomposed
from semkv_deploy.export.foreign.evaluate import Evaluator
from semkv_deploy.export.foreign.in_place import InPlace

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from semkv_deploy.export.foreign.decomposed import Mask
    from semkv_deploy.export.foreign.interface import Interface
    from semkv_deploy.export.foreign.layers import Layer

LENGTHS = ((0, 13), (5, 4), (9, 1), (8191, 1))
"""Slots before a run, and its rows. The last tells windows: a longer one than that is not seen."""

_DEAD = 16
"""Slots behind the live ones of a cache in place whose size the host chooses."""


def with_windows(model: ir.Model, roles: Interface) -> tuple[tuple[Layer, ...], bool]:
    """The layers, with the windows that their masks have; and whether all masks can be made for a piece after others.

    Raises:
        SemkvError: naming a layer whose mask is not that of a causal decoder.
    """
    found: dict[tuple[Mask, ...], tuple[int, bool]] = {}
    layers = []
    for layer in roles.layers:
        if isinstance(layer, Decomposed):
            if layer.masks not in found:
                found[layer.masks] = _window(model, roles, layer)
            layer = replace(layer, window=found[layer.masks][0])
        layers.append(layer)
    return tuple(layers), all(pieces for _, pieces in found.values())


def _window(model: ir.Model, roles: Interface, layer: Decomposed) -> tuple[int, bool]:
    named = [str(mask.value.name) for mask in layer.masks if mask.value is not None]
    evaluators = {name: Evaluator(model, name) for name in named}
    windows: dict[int, int] = {}
    pieces = True
    for past, rows in _lengths(layer):
        given, slots = feeds(roles, past, rows), slots_of(layer, past, rows)
        try:
            parts = [_hidden(evaluators, mask, given, past, rows, slots) for mask in layer.masks]
        except SemkvError:
            # genai's mask for MultiHeadAttention is of prompts and of single tokens: of what its host runs.
            if not past or rows == 1:
                raise
            pieces = False
            continue
        try:
            windows[past + rows] = window_of(_of_live(functools.reduce(np.add, parts), past + rows), past, rows)
        except ValueError as error:
            names = " and ".join(named)
            raise _another(layer, str(error), f"{names or 'none'} for {rows} tokens after {past}") from None
    window = max(windows.values())
    if any(found != (window if slots > window else 0) for slots, found in windows.items()):
        raise _another(layer, "has windows that differ by length", str(windows))
    return window, pieces


def _lengths(layer: Decomposed) -> list[tuple[int, int]]:
    """Slots before a run and its rows, as many as the layer's caches take, up to all of them."""
    most = layer.capacity if isinstance(layer, InPlace) else None
    if most is None or most > sum(LENGTHS[-1]):
        return list(LENGTHS)
    return [(past, rows) for past, rows in LENGTHS if past + rows < most] + [(most - 1, 1)]


def slots_of(layer: Layer, past: int, rows: int) -> int:
    """Slots of a layer's caches in a run: those that are live, or all of one in place."""
    if not isinstance(layer, InPlace):
        return past + rows
    return max(layer.capacity or 0, past + rows) if layer.capacity else past + rows + _DEAD


def _of_live(mask: NDArray[np.float32], live: int) -> NDArray[np.float32]:
    """The mask of live slots.

    Raises:
        ValueError: when it leaves others to be seen.
    """
    if (mask[..., live:] > -1e4).any():
        raise ValueError("shows slots that nothing was written to")
    return mask[..., :live]


def _another(layer: Decomposed, what: str, got: str) -> SemkvError:
    expected = "that of a causal decoder, with or without a sliding window"
    return SemkvError(f"a mask that {what}", where=layer.node.name, expected=expected, got=got)


def _hidden(
    evaluators: dict[str, Evaluator], mask: Mask, given: dict[str, NDArray[Any]], past: int, rows: int, slots: int
) -> NDArray[np.float32]:
    """A mask as what would be added to logits."""
    if mask.value is None:
        later = np.arange(slots) > past + np.arange(rows)[:, None]
        return np.where(later, np.float32(-np.inf), np.float32(0))
    value = evaluators[str(mask.value.name)](given)
    if mask.added:
        return value
    seen = (value != 0) != mask.inverted
    return np.where(seen, np.float32(0), np.float32(-np.inf))


def feeds(roles: Interface, past: int, rows: int) -> dict[str, NDArray[Any]]:
    """Inputs of a run of one row of the batch, all caches empty of numbers."""
    given: dict[str, NDArray[Any]] = {str(roles.ids.name): np.zeros((1, rows), _type(roles.ids))}
    if roles.mask is not None:
        width = slots_of(roles.layers[0], past, rows) if roles.mask_of_slots else past + rows
        given[str(roles.mask.name)] = (np.arange(width) < past + rows).astype(_type(roles.mask))[None]
    if roles.positions is not None:
        given[str(roles.positions.name)] = np.arange(past, past + rows, dtype=np.int64)[None]
    if roles.counts:
        given |= {str(count.name): np.array([n]) for count, n in zip(roles.counts, (past, past + rows), strict=True)}
    for layer in roles.layers:
        slots = slots_of(layer, past, rows)
        before = slots if isinstance(layer, InPlace) else past
        size, heads = layer.head_dim or 1, layer.kv_heads
        flat = isinstance(layer, InPlace) and layer.flat
        for cache in layer.past:
            # One number, however long: what only asks for its size costs nothing.
            shape = (1, before, heads * size) if flat else (1, heads, before, size)
            given[str(cache.name)] = np.zeros(shape, np.float32)
    return given


def _type(value: ir.Value) -> Any:
    return np.int64 if value.dtype is None else value.dtype.numpy()


def window_of(mask: NDArray[np.float32], past: int, rows: int) -> int:
    """The sliding window of a mask that is causal: 0 for none, or for one that is longer than what is there.

    Args:
        mask: `[…, rows or 1, past + rows]`, of what is added to logits: 0 where a slot is seen, -1e4 or less where it
            is not.
        past: slots before the first row.

    Raises:
        ValueError: saying what it is, when it is no causal mask.
    """
    slots = past + rows
    if mask.ndim < 2 or mask.shape[-2] not in (1, rows) or mask.shape[-1] != slots or not mask.size:
        raise ValueError(f"has the shape {list(mask.shape)}")
    flat = np.broadcast_to(mask, (*mask.shape[:-2], rows, slots)).reshape(-1, rows, slots)
    if (flat != flat[:1]).any():
        raise ValueError("differs by row of the batch or by head")
    seen = flat[0] == 0
    if not (seen | (flat[0] <= -1e4)).all():
        raise ValueError("has values that are neither 0 nor those of a mask")
    distance = past + np.arange(rows)[:, None] - np.arange(slots)
    if not seen[distance == 0].all() or seen[distance < 0].any():
        raise ValueError("is not causal")
    hidden = distance[(distance >= 0) & ~seen]
    window = int(hidden.min()) if hidden.size else 0
    if window and seen[distance >= window].any():
        raise ValueError("hides what no sliding window hides")
    return window

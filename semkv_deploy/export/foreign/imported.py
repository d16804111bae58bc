"""An import in ONNX Runtime, driven by the names and the caches of its original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.export.foreign.original import Caches, Names, open_session, outputs
from semkv_deploy.model.names import LENGTH, LOGITS, LOGITS_INDEX, cache_names, present_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.model.config import ModelFacts

_ROOM = 64
"""Dead slots behind those of a run."""


class Imported:
    """A portable decoder whose caches are full; `run` goes on from live slots and leaves them longer.

    Args:
        path: of the decoder.
        names: of its original's caches.

    Raises:
        SemkvError: when ONNX Runtime does not load it.
    """

    def __init__(self, path: Path, model: ModelFacts, names: Names) -> None:
        self.session, self.model = open_session(path), model
        layers = range(model.layers)
        self._names = {
            theirs: ours
            for layer, pasts in zip(layers, names.pasts, strict=True)
            for theirs, ours in zip(pasts[:2], cache_names(layer, model.layers)[:2], strict=True)
        }
        self._presents = [name for layer in layers for name in present_names(layer, model.layers)]
        self._biases = [cache_names(layer, model.layers)[2] for layer in layers]

    def run(self, caches: Caches, tokens: NDArray[Any], position: int) -> NDArray[Any]:
        """Logits `[B,S,V]`, float32, of tokens `[B,S]` after `position` slots."""
        batch, count = tokens.shape
        slots = position + count + _ROOM
        rows = np.tile(np.arange(count), (batch, 1))
        feeds: dict[str, Any] = {
            "input_ids": tokens,
            "position_ids": rows + position,
            LOGITS_INDEX: rows,
            LENGTH: np.full((self.model.layers, batch), position),
        }
        feeds |= {bias: np.zeros((batch, self.model.kv_heads, slots), np.float32) for bias in self._biases}
        for theirs, ours in self._names.items():
            feeds[ours] = np.zeros((batch, self.model.kv_heads, slots, self.model.head_dim), np.float32)
            feeds[ours][:, :, :position] = caches[theirs]
        wanted = {value.name for value in self.session.get_inputs()}
        feeds = {name: value for name, value in feeds.items() if name in wanted}
        logits, *presents = outputs(self.session, [LOGITS, *self._presents], feeds, "the import")
        for theirs, present in zip(self._names, presents, strict=True):
            caches[theirs] = present[:, :, : position + count]
        return logits

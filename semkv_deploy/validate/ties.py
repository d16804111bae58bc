"""Near ties between clusters: when a different choice of slots is proved to be no fault of the target's.

Which slots merge is decided by comparing sums in floating point, and a target adds them up in another order. Of the
many thousands of choices in a long run, one may tip. Such a choice is accepted only on proof: before the compression
the target's layer agreed with the reference's within the tolerance, and the *reference's* compressor, given the
target's layer, makes the very choice that the target made. The layer then takes the reference's state, so that what
follows stays comparable. A compressor that chooses wrongly fails the second condition, a decoder that computes wrongly
the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from semkv_deploy.targets.onnxruntime.engine import Compressed, inference_session
from semkv_deploy.validate.compare import difference, live_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.validate.compare import Tolerance


class Before(NamedTuple):
    """A compression that is about to happen: for each layer its buffers and metadata, and the compressor's inputs."""

    layers: list[dict[str, NDArray[Any]]]
    inputs: Sequence[dict[str, Any]]


def before(layers: Sequence[Any], state: Sequence[dict[str, NDArray[np.int64]]], inputs: Sequence[Any]) -> Before:
    """A copy of everything a compression is made from, caches in float32."""
    copies = []
    for buffers, metadata in zip(layers, state, strict=True):
        copy = {name: array.copy() for name, array in metadata.items()}
        copy["key_cache"] = live_rows(buffers.key, metadata["length"])
        copy["value_cache"] = live_rows(buffers.value, metadata["length"])
        copy["slot_bias"] = buffers.bias.copy()
        copies.append(copy)
    return Before(copies, inputs)


class Ties:
    """Settles near ties of one target against the reference.

    Args:
        compressor: the reference's.
        tolerance: what the layers may differ by.

    Attributes:
        settled: number of layers in which a choice tipped.
    """

    def __init__(self, compressor: Path, tolerance: Tolerance) -> None:
        self._tolerance = tolerance
        self._compressor = inference_session(compressor, threads=1)
        self.settled = 0

    def settle(self, reference: Before, target: Before, layers: Sequence[Any], done: Sequence[Any]) -> list[Any]:
        """What the target's compression gave, with the reference's result in layers where the choice is a proved tie.

        Args:
            reference, target: the same compression of both, before it happened.
            layers: the target's buffers after it; rewritten where a tie is settled.
            done: `Compressed` of each layer.
        """
        settled = list(done)
        for number, (ours, theirs) in enumerate(zip(reference.layers, target.layers, strict=True)):
            got = _outcome(layers[number], done[number])
            expected = self._compress(ours, reference.inputs[number])
            if self._same(expected, got) or not self._same(_as_outcome(ours), _as_outcome(theirs)):
                continue
            if not self._same(self._compress(theirs, target.inputs[number]), got):
                continue
            for part, name in (("key", "key_cache_out"), ("value", "value_cache_out"), ("bias", "slot_bias_out")):
                getattr(layers[number], part)[:] = expected[name]
            settled[number] = Compressed(*(expected[name] for name in _CHOICE))
            self.settled += 1
        return settled

    def _compress(self, layer: dict[str, NDArray[Any]], inputs: dict[str, Any]) -> dict[str, NDArray[Any]]:
        return run_compressor(self._compressor, {**layer, **inputs})

    def _same(self, expected: dict[str, NDArray[Any]], got: dict[str, NDArray[Any]]) -> bool:
        """Whether two states of a layer hold the same tokens in the same slots, and numbers within tolerance."""
        if not np.array_equal(expected["length_out"], got["length_out"]):
            return False
        limits = {"key_cache_out": self._tolerance.cache, "value_cache_out": self._tolerance.cache}
        for name, first in expected.items():
            if name not in got:
                continue
            second, limit = got[name], limits.get(name, self._tolerance.bias if name == "slot_bias_out" else 0.0)
            if first.ndim > 1:
                live = np.arange(first.shape[2]) < expected["length_out"][:, None, None]
                live = live[..., None] if first.ndim == 4 else live
                first, second = np.where(live, first, 0), np.where(live, second, 0)
            if difference(first, second, limit).where is not None:
                return False
        return True


_CHOICE = ("length_out", "slot_position_out", "slot_chunk_out", "level", "evicted")
"""A compressor's outputs in the order of `Compressed`."""


def _outcome(buffers: Any, done: Any) -> dict[str, NDArray[Any]]:
    outputs = {"key_cache_out": buffers.key, "value_cache_out": buffers.value, "slot_bias_out": buffers.bias}
    return {**outputs, **dict(zip(_CHOICE, done, strict=True))}


def _as_outcome(layer: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {f"{name}_out": array for name, array in layer.items()}


def run_compressor(session: Any, feed: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """All outputs of a compressor by name; inputs are cast to its types, and `feed` may hold more than it takes."""
    types = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    cast = {
        value.name: feed[value.name].astype(types[value.type]) if value.type in types else feed[value.name]
        for value in session.get_inputs()
    }
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, cast), strict=True))

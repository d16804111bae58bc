"""Near ties between clusters: when a different choice of slots is proved to be no fault of the target's.

Which slots merge is decided by comparing sums in floating point, and a target adds them up in another order. Of the
many thousands of choices in a long run, one may tip. Such a choice is accepted only on proof: before the compression
the target's group agreed with the reference's within the tolerance, and the *reference's* compressor, given the
target's group, makes the very choice that the target made. The group then takes the reference's state, so that what
follows stays comparable. A compressor that chooses wrongly fails the second condition, a decoder that computes wrongly
the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from semkv_deploy.methods.base import STATE
from semkv_deploy.targets.onnxruntime.engine import inference_session
from semkv_deploy.validate.compare import difference, live_rows

if TYPE_CHECKING:
    from semkv_deploy.bundle.opened import OpenedBudget
    from semkv_deploy.targets.engine import Array, Engine, Feeds
    from semkv_deploy.validate.compare import Tolerance


class Before(NamedTuple):
    """A compression that is about to happen: by group, its state, and the program's other inputs."""

    state: dict[int, dict[str, Array]]
    inputs: dict[int, dict[str, Array]]


def before(engine: Engine, feeds: Mapping[int, Feeds]) -> Before:
    """A copy of everything a compression is made from, caches in float32."""
    state, inputs = {}, {}
    for group, given in feeds.items():
        copy = {name: given[name].copy() for name in STATE if name in given}
        for part in ("key", "value"):
            copy[f"{part}_cache"] = live_rows(engine.read(part, group), given["length"])
        for buffer, name in engine.contract.compressed_buffers().items():
            if name not in copy:
                copy[name] = engine.read(buffer, group).copy()
        state[group] = copy
        # Slot columns are the session's own, and change.
        inputs[group] = {name: array.copy() for name, array in given.items() if name not in STATE}
    return Before(state, inputs)


class Ties:
    """Settles near ties of one target against the reference.

    Args:
        reference: the portable graphs.
        tolerance: what the groups may differ by.

    Attributes:
        settled: number of groups in which a choice tipped.
    """

    def __init__(self, reference: OpenedBudget, tolerance: Tolerance) -> None:
        self._tolerance = tolerance
        self._compressors = {
            group: session
            for graph in reference.contract.compressors
            for session in [inference_session(reference.path(graph.onnx), threads=1)]
            for group in graph.groups
        }
        self.settled = 0

    def settle(
        self, reference: Before, target: Before, engine: Engine, done: Mapping[int, Mapping[str, Array]]
    ) -> dict[int, dict[str, Array]]:
        """What the target's compression gave, with the reference's result in groups where the choice is a proved tie.

        Args:
            reference, target: the same compression of both, before it happened.
            engine: the target's, after it; buffers are rewritten where a tie is settled.
            done: outputs of each group.
        """
        settled = {group: dict(outputs) for group, outputs in done.items()}
        for group, theirs in target.state.items():
            if group not in reference.state:
                continue
            ours = reference.state[group]
            got = {**_buffers(engine, group), **done[group]}
            expected = self._compress(group, ours, reference.inputs[group])
            if self._same(expected, got) or not self._same(_as_outcome(ours), _as_outcome(theirs)):
                continue
            if not self._same(self._compress(group, theirs, target.inputs[group]), got):
                continue
            for buffer, name in engine.contract.compressed_buffers().items():
                if f"{name}_out" in expected:  # scales of int8 caches are no part of the portable graph
                    engine.write(buffer, group, expected[f"{name}_out"])
            settled[group].update({name: expected[name] for name in done[group]})
            self.settled += 1
        return settled

    def _compress(self, group: int, state: dict[str, Array], inputs: dict[str, Array]) -> dict[str, Array]:
        return run_compressor(self._compressors[group], {**state, **inputs})

    def _same(self, expected: dict[str, Array], got: dict[str, Array]) -> bool:
        """Whether two states of a group hold the same tokens in the same slots, and numbers within tolerance."""
        if not np.array_equal(expected["length_out"], got["length_out"]):
            return False
        limits = {f"{name}_out": self._tolerance.cache for name in ("key_cache", "value_cache")}
        limits |= {f"{name}_out": self._tolerance.bias for name in ("slot_bias", "slot_attention")}
        limits["reference_queries_out"] = self._tolerance.cache
        for name, first in expected.items():
            if name not in got:
                continue
            second, limit = got[name], limits.get(name, 0.0)
            if first.ndim > 1 and name != "reference_queries_out":
                live = np.arange(first.shape[2]) < expected["length_out"][:, None, None]
                live = live[..., None] if first.ndim == 4 else live
                first, second = np.where(live, first, 0), np.where(live, second, 0)
            if difference(first, second, limit).where is not None:
                return False
        return True


def _buffers(engine: Engine, group: int) -> dict[str, Array]:
    return {f"{name}_out": engine.read(buffer, group) for buffer, name in engine.contract.compressed_buffers().items()}


def _as_outcome(state: dict[str, Array]) -> dict[str, Array]:
    return {f"{name}_out": array for name, array in state.items()}


def run_compressor(session: Any, feed: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of a compressor by name; inputs are cast to its types, and `feed` may hold more than it takes."""
    types = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    cast = {
        value.name: feed[value.name].astype(types[value.type]) if value.type in types else feed[value.name]
        for value in session.get_inputs()
    }
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, cast), strict=True))

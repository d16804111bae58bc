"""A Polygraphy runner with state: one event of a conversation in, logits and the whole state of the caches out.

Polygraphy's own runners know one network and no state. This one holds a `Session`, so that what is compared is what
users run: caches appended in place or copied back, compressed layers, lengths and slots that advance.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from semkv_deploy.validate.compare import live_rows
from semkv_deploy.validate.scenario import END_TURN, PREFILL
from semkv_deploy.validate.ties import Before, Ties, before

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.runtime.session import Session

NO_SLOT = -1
"""What stands for a dead slot in the outputs `slot_position` and `slot_chunk`."""

MINUS_INFINITY = -1e30
"""What stands for -inf in the output `slot_bias`, so that differences stay numbers."""

NO_COMPRESSION = -2
"""What stands in the output `level` when an event compressed nothing."""


class WatchedEngine:
    """An engine, and what its calls of one event were.

    Attributes:
        before_call: called with ("run" or "compress", the call's arguments by name); None: nothing is.
        compressed: what each compression gave.
        inner_logits: of each prefill run the logits `[n,2,V]` of its first and its middle row. A session asks for a
            prompt's last row only, which sees every slot: in the last layer nothing else would show a wrong mask.
        before: what each compression was made from, where `keep_before` asks for it.
        ties, reference: settle near ties with this engine's compressions; None: nothing is settled.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.batch, self.capacity, self.groups = engine.batch, engine.capacity, engine.groups
        self.before_call: Callable[[str, dict[str, Any]], None] | None = None
        self.compressed: list[Sequence[Any]] = []
        self.inner_logits: list[NDArray[np.float32]] = []
        self.before: list[Before] = []
        self.keep_before = False
        self.ties: Ties | None = None
        self.reference: WatchedEngine | None = None

    @property
    def layers(self) -> Any:
        return self.engine.layers

    def run(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        length: NDArray[np.int64],
        row: int | None = None,
    ) -> NDArray[np.float32]:
        if self.before_call:
            names = ("tokens", "positions", "logits_index", "length", "row")
            self.before_call("run", dict(zip(names, (tokens, positions, logits_index, length, row), strict=True)))
        if tokens.shape[1] == 1:
            logits: NDArray[np.float32] = self.engine.run(tokens, positions, logits_index, length, row)
            return logits
        inner = np.broadcast_to(np.array([0, tokens.shape[1] // 2]), (len(tokens), 2))
        logits = self.engine.run(tokens, positions, np.concatenate([inner, logits_index], axis=1), length, row)
        self.inner_logits.append(logits[:, :2].copy())
        return logits[:, 2:]

    def compress(
        self, state: Sequence[dict[str, NDArray[np.int64]]], inputs: Sequence[dict[str, Any]]
    ) -> Sequence[Any]:
        if self.before_call:
            self.before_call("compress", {"state": state, "inputs": inputs})
        if self.ties is not None or self.keep_before:
            self.before.append(before(self.layers, state, inputs))
        done: Sequence[Any] = self.engine.compress(state, inputs)
        number = len(self.compressed)
        if self.ties is not None and self.reference is not None and number < len(self.reference.before):
            done = self.ties.settle(self.reference.before[number], self.before[number], self.layers, done)
        self.compressed.append(done)
        return done

    def forget(self) -> None:
        """Starts the record of another event."""
        self.compressed, self.inner_logits, self.before = [], [], []

    def reset(self) -> None:
        self.engine.reset()

    def cache_bytes(self) -> int:
        size: int = self.engine.cache_bytes()
        return size


class StatefulRunner(BaseRunner):
    """Runs the events of a scenario on a session.

    Args:
        name: of the runner in results.
        open_session: makes the session; called when the runner is activated.
        batch: rows of that session.
        reference: a runner that has run each event before this one does.
        ties: makes what settles near ties with that runner; None: nothing is settled.

    An event (`scenario.Event.feed`) is the inputs `kind` `[]`, `tokens` `[B,S]`, `count` `[B]`. Outputs, in float32 or
    int64, with L layers, H KV heads, C slots, D head size, G groups:

    | output | shape | |
    |---|---|---|
    | position | `[B]` | tokens seen |
    | length | `[L,B]` | live slots |
    | compressions, level, evicted | `[]`, `[L,B]`, `[L,B]` | of this event; the last compression's levels |
    | slot_position.NN, slot_chunk.NN | `[B,G,C]` | which token a slot stands for; `NO_SLOT` where dead |
    | slot_bias.NN | `[B,H,C]` | 0 where dead |
    | key.NN, value.NN | `[B,H,C,D]` | live rows; 0 where dead |
    | inner_logits | `[runs,2,V]` | of a prefill: the first and the middle row of every run |
    | logits | `[B,V]` | after each row's last token; 0 for a row that had none |

    A graph that cannot be loaded, or an event that raises, gives no outputs and `error` says why; from then on the
    runner does nothing.
    """

    def __init__(
        self,
        name: str,
        open_session: Callable[[], Session],
        batch: int,
        *,
        reference: StatefulRunner | None = None,
        ties: Callable[[], Ties] | None = None,
    ) -> None:
        super().__init__(name=name)
        self._reference, self._ties = reference, ties
        self._settled = 0
        self._open, self.batch = open_session, batch
        self.session: Session | None = None
        self.error: str | None = None
        self.stopped = False
        self.seconds = 0.0

    def activate_impl(self) -> None:
        self._greedy = np.zeros(self.batch, np.int64)
        self.error, self.stopped = None, False
        try:
            self.session = self._open()
        except Exception as error:
            # Any failure of a graph under test is a finding, not the end of the validation.
            self.error, self.stopped = _sentence(error), True
            return
        self.engine = WatchedEngine(self.session.engine)
        self.session.engine = self.engine
        if self._reference is not None and self._ties is not None and self._reference.session is not None:
            self._reference.engine.keep_before = True
            self.engine.reference, self.engine.ties = self._reference.engine, self._ties()

    def deactivate_impl(self) -> None:
        # Kept for reports; the graphs are not.
        if self.session is not None and self.engine.ties is not None:
            self._settled = self.engine.ties.settled
        self.session = None

    def get_input_metadata_impl(self) -> Any:
        return (
            TensorMetadata()
            .add("kind", np.int64, ())
            .add("tokens", np.int64, (self.batch, -1))
            .add("count", np.int64, (self.batch,))
        )

    @property
    def ties(self) -> int:
        """Layers in which a near tie was settled; known once the runner is deactivated."""
        return self._settled

    def greedy(self) -> NDArray[np.int64]:
        """`[B]`: each row's most likely next token."""
        return self._greedy

    def infer_impl(self, feed_dict: dict[str, NDArray[np.int64]]) -> Any:
        self.inference_time = 0.0
        if self.stopped:
            return OrderedDict()
        started = time.perf_counter()
        try:
            outputs = self.infer_unguarded(feed_dict)
        except Exception as error:
            self.error, self.stopped = _sentence(error), True
            return OrderedDict()
        self.inference_time = time.perf_counter() - started
        self.seconds += self.inference_time
        return outputs

    def infer_unguarded(self, feed_dict: dict[str, NDArray[np.int64]]) -> Any:
        """The outputs of an event; whatever goes wrong is raised."""
        return self._outputs(self._event(int(feed_dict["kind"]), feed_dict["tokens"], feed_dict["count"]))

    def _event(self, kind: int, tokens: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.float32] | None:
        session = self.session
        assert session is not None
        self.engine.forget()
        if kind == END_TURN:
            # A bundle that compresses only when full compresses here too: a short scenario must reach the compressor.
            method = session.method
            session.method = method.model_copy(update={"compress_at": "turn"})
            session.end_turn()
            session.method = method
            return None
        moving = count > 0
        if kind == PREFILL:
            logits = session.prefill([row[:n].tolist() for row, n in zip(tokens, count, strict=True)])
        else:
            logits = session.step(tokens[:, 0], active=moving)
        logits = np.where(moving[:, None], logits, np.float32(0))
        self._greedy = np.where(moving, logits.argmax(-1), self._greedy)
        return logits

    def _outputs(self, logits: NDArray[np.float32] | None) -> Any:
        session = self.session
        assert session is not None
        layers = len(session.length)
        level = np.full((layers, session.batch), NO_COMPRESSION, np.int64)
        evicted = np.zeros((layers, session.batch), np.int64)
        for run in self.engine.compressed:
            for layer, done in enumerate(run):
                level[layer] = done.level
                evicted[layer] += done.evicted
        outputs: OrderedDict[str, Any] = OrderedDict(
            position=session.position.copy(),
            length=session.length.copy(),
            compressions=np.array(len(self.engine.compressed), np.int64),
            level=level,
            evicted=evicted,
        )
        for layer, buffers in enumerate(self.engine.layers):
            live = np.arange(self.engine.capacity) < session.length[layer][:, None]
            for name in ("slot_position", "slot_chunk"):
                outputs[f"{name}.{layer:02d}"] = np.where(live[:, None], getattr(session, name)[layer], NO_SLOT)
            bias = np.where(np.isneginf(buffers.bias), np.float32(MINUS_INFINITY), buffers.bias)
            outputs[f"slot_bias.{layer:02d}"] = np.where(live[:, None], bias, np.float32(0))
            for name in ("key", "value"):
                outputs[f"{name}.{layer:02d}"] = live_rows(getattr(buffers, name), session.length[layer])
        if self.engine.inner_logits:
            outputs["inner_logits"] = np.concatenate(self.engine.inner_logits)
        if logits is not None:
            outputs["logits"] = logits
        return outputs


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"

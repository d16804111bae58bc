"""A Polygraphy runner with state: one event of a conversation in, logits and the whole state of the caches out.

Polygraphy's own runners know one network and no state. This one holds a `Session`, so that what is compared is what
users run: caches appended in place or copied back, compressed layers, lengths and slots that advance.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from semkv_deploy.methods.layout import COMPRESS
from semkv_deploy.model.names import number_tag
from semkv_deploy.runtime.session import Session
from semkv_deploy.validate.compare import live_rows
from semkv_deploy.validate.scenario import END_TURN, PREFILL
from semkv_deploy.validate.ties import Before, Ties, before

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.bundle.contract import Contract
    from semkv_deploy.targets.engine import Array, Engine, Feeds

NO_SLOT = -1
"""What stands for a dead slot in the outputs of slot columns."""

MINUS_INFINITY = -1e30
"""What stands for -inf in the output `slot_bias`, so that differences stay numbers."""

NO_COMPRESSION = -2
"""What stands in the output `level` when an event compressed nothing."""


class WatchedEngine:
    """An engine, and what its calls of one event were.

    Attributes:
        before_call: called with (program, feeds, row) before a run, and with (program, feeds by group, None) before a
            run of groups; None: nothing is.
        compressed: what each compression gave, by group.
        inner_logits: of each prefill run the logits `[n,2,V]` of its first and its middle row. A session asks for a
            prompt's last row only, which sees every slot: in the last layer nothing else would show a wrong mask.
        before: what each compression was made from, where `keep_before` asks for it.
        ties, reference: settle near ties with this engine's compressions; None: nothing is settled.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.opened, self.batch = engine, engine.opened, engine.batch
        self.before_call: Callable[[str, Any, int | None], None] | None = None
        self.compressed: list[dict[int, dict[str, Array]]] = []
        self.inner_logits: list[NDArray[np.float32]] = []
        self.before: list[Before] = []
        self.keep_before = False
        self.ties: Ties | None = None
        self.reference: WatchedEngine | None = None

    @property
    def contract(self) -> Contract:
        return self.engine.contract

    def run(self, program: str, feeds: Feeds, *, row: int | None = None) -> dict[str, Array]:
        if self.before_call:
            self.before_call(program, feeds, row)
        tokens, index = feeds["input_ids"], feeds["logits_index"]
        if tokens.shape[1] == 1:
            return self.engine.run(program, feeds, row=row)
        inner = np.broadcast_to(np.array([0, tokens.shape[1] // 2]), (len(tokens), 2))
        more = {**feeds, "logits_index": np.concatenate([inner, index], axis=1)}
        outputs = self.engine.run(program, more, row=row)
        self.inner_logits.append(outputs["logits"][:, :2].copy())
        return {**outputs, "logits": outputs["logits"][:, 2:]}

    def run_groups(self, program: str, feeds: Mapping[int, Feeds]) -> dict[int, dict[str, Array]]:
        if self.before_call:
            self.before_call(program, feeds, None)
        if program != COMPRESS:
            return self.engine.run_groups(program, feeds)
        if self.ties is not None or self.keep_before:
            self.before.append(before(self.engine, feeds))
        done = self.engine.run_groups(program, feeds)
        number = len(self.compressed)
        if self.ties is not None and self.reference is not None and number < len(self.reference.before):
            done = self.ties.settle(self.reference.before[number], self.before[number], self.engine, done)
        self.compressed.append(done)
        return done

    def forget(self) -> None:
        """Starts the record of another event."""
        self.compressed, self.inner_logits, self.before = [], [], []

    def read(self, buffer: str, group: int) -> Array:
        return self.engine.read(buffer, group)

    def write(self, buffer: str, group: int, array: Array) -> None:
        self.engine.write(buffer, group, array)

    def reset(self, row: int | None = None) -> None:
        self.engine.reset(row)

    def cache_bytes(self) -> int:
        return self.engine.cache_bytes()


class StatefulRunner(BaseRunner):
    """Runs the events of a scenario on a session.

    Args:
        name: of the runner in results.
        open_engine: makes the engine; called when the runner is activated.
        batch: rows of that session.
        reference: a runner that has run each event before this one does.
        ties: makes what settles near ties with that runner; None: nothing is settled.

    An event (`scenario.Event.feed`) is the inputs `kind` `[]`, `tokens` `[B,S]`, `count` `[B]`. Outputs, in float32 or
    int64, with N cache groups, H KV heads, C slots, D head size, G cluster groups:

    | output | shape | |
    |---|---|---|
    | position | `[B]` | tokens seen |
    | length | `[N,B]` | live slots |
    | compressions, level, evicted | `[]`, `[N,B]`, `[N,B]` | of this event; the last compression's levels |
    | slot_position.NN, … | `[B,G,C]` | every slot column: which token a slot stands for; `NO_SLOT` where dead |
    | slot_bias.NN, slot_attention.NN | `[B,H,C]` | where there is such a buffer; 0 where dead |
    | key.NN, value.NN | `[B,H,C,D]` | live rows; 0 where dead |
    | inner_logits | `[runs,2,V]` | of a prefill: the first and the middle row of every run |
    | logits | `[B,V]` | after each row's last token; 0 for a row that had none |

    A graph that cannot be loaded, or an event that raises, gives no outputs and `error` says why; from then on the
    runner does nothing.
    """

    def __init__(
        self,
        name: str,
        open_engine: Callable[[], Engine],
        batch: int,
        *,
        reference: StatefulRunner | None = None,
        ties: Callable[[], Ties] | None = None,
    ) -> None:
        super().__init__(name=name)
        self._reference, self._ties = reference, ties
        self._settled = 0
        self._open, self.batch = open_engine, batch
        self.session: Session | None = None
        self.error: str | None = None
        self.stopped = False
        self.seconds = 0.0

    def activate_impl(self) -> None:
        self._greedy = np.zeros(self.batch, np.int64)
        self.error, self.stopped = None, False
        try:
            self.engine = WatchedEngine(self._open())
            self.session = Session(self.engine)
        except Exception as error:
            # Any failure of a graph under test is a finding, not the end of the validation.
            self.error, self.stopped = _sentence(error), True
            return
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
        """Groups in which a near tie was settled; known once the runner is deactivated."""
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
            session.compress()
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
        groups = session.contract.cache.groups
        level = np.full(session.length.shape, NO_COMPRESSION, np.int64)
        evicted = np.zeros(session.length.shape, np.int64)
        for run in self.engine.compressed:
            for group, done in run.items():
                level[group] = done["level"]
                evicted[group] += done["evicted"]
        outputs: OrderedDict[str, Any] = OrderedDict(
            position=session.position.copy(),
            length=session.length.copy(),
            compressions=np.array(len(self.engine.compressed), np.int64),
            level=level,
            evicted=evicted,
        )
        for number, of in enumerate(groups):
            tag, length = number_tag(number, len(groups)), session.length[number]
            live = np.arange(of.capacity) < length[:, None]
            for name, columns in session.slots.columns.items():
                outputs[f"{name}.{tag}"] = np.where(live[:, None], columns[number], NO_SLOT)
            for buffer in session.contract.cache.buffers:
                if buffer.of_slots:
                    said = self.engine.read(buffer.name, number)
                    said = np.where(np.isneginf(said), np.float32(MINUS_INFINITY), said)
                    outputs[f"{buffer.name}.{tag}"] = np.where(live[:, None], said, np.float32(0))
                elif not buffer.has_slots:
                    outputs[f"{buffer.name}.{tag}"] = np.array(self.engine.read(buffer.name, number), np.float32)
            for name in ("key", "value"):
                rows = self.engine.read(name, number)
                if session.contract.dtype == "int8":
                    rows = rows * self.engine.read(f"{name}_scale", number)[..., None]
                outputs[f"{name}.{tag}"] = live_rows(rows, length)
        if self.engine.inner_logits:
            outputs["inner_logits"] = np.concatenate(self.engine.inner_logits)
        if logits is not None:
            outputs["logits"] = logits
        return outputs


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"

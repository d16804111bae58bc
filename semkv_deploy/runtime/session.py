"""A session: turns of a conversation on a cache that never outgrows its capacity.

The caller sees tokens and logits; layers, slots and compression stay inside. Positions come from the count of tokens
seen, never from how many slots are live.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.sampling import Sampler
from semkv_deploy.runtime.tokens import ChunkCounter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.budget import StaticProfile
    from semkv_deploy.methods.base import Method

Tokens = Sequence[int]

NEVER = 2.0
"""A similarity threshold that no cosine exceeds."""


class Engine(Protocol):
    """What a session needs of a target: see `targets.onnxruntime.engine.OnnxRuntimeEngine`."""

    batch: int
    capacity: int
    groups: int

    def run(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        logits_index: NDArray[np.int64],
        length: NDArray[np.int64],
        row: int | None = None,
    ) -> NDArray[np.float32]: ...

    def compress(
        self, state: Sequence[dict[str, NDArray[np.int64]]], inputs: Sequence[dict[str, Any]]
    ) -> Sequence[Any]: ...

    def reset(self) -> None: ...

    def cache_bytes(self) -> int: ...


@dataclass
class CompressionStats:
    """What compression did so far.

    Attributes:
        runs: how often a cache was compressed (all layers count as one).
        seconds: time spent in it.
        levels: how many layer rows took each level of their ladder (-1: the row was left alone).
        evicted: slots dropped because no level met the target, summed over layers and rows.
    """

    runs: int = 0
    seconds: float = 0.0
    levels: Counter[int] = field(default_factory=Counter)
    evicted: int = 0


class Session:
    """Many turns over one cache, for one or several batch rows.

    Args:
        engine: holds the caches and runs the graphs.
        windows: sliding window of each layer in tokens, 0: none.
        method: compression method.
        profile: capacity, target and prefill chunk.
        max_context: most tokens a row may have.
        is_delimiter: `[vocab]` bool, per token id.
        thresholds: `[layers][levels]` similarity thresholds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        windows: Sequence[int],
        method: Method,
        profile: StaticProfile,
        max_context: int,
        is_delimiter: NDArray[np.bool_],
        thresholds: Sequence[Sequence[float]],
    ) -> None:
        self.engine, self.method, self.profile, self.max_context = engine, method, profile, max_context
        self.stats = CompressionStats()
        self._is_delimiter = is_delimiter
        self._thresholds = [np.asarray(row, np.float32) for row in thresholds]
        self._windows = windows
        batch, layers = engine.batch, len(windows)
        self.position = np.zeros(batch, np.int64)
        """`[B]` tokens seen."""
        self.length = np.zeros((layers, batch), np.int64)
        """`[layers,B]` live slots."""
        metadata = (layers, batch, engine.groups, engine.capacity)
        self.slot_position = np.zeros(metadata, np.int64)
        self.slot_chunk = np.zeros(metadata, np.int64)
        self._chunks = [ChunkCounter() for _ in range(batch)]

    @property
    def batch(self) -> int:
        return self.engine.batch

    @property
    def kept_slots(self) -> NDArray[np.int64]:
        """`[B]` live slots of the fullest layer."""
        return self.length.max(0)

    def reset(self) -> None:
        """Starts a new conversation in the same buffers."""
        self.engine.reset()
        self.position[:], self.length[:] = 0, 0
        self._chunks = [ChunkCounter() for _ in range(self.batch)]
        self.stats = CompressionStats()

    def prefill(self, tokens: Tokens | Sequence[Tokens], *, all_logits: bool = False) -> NDArray[np.float32]:
        """Appends a prompt (or the next turn's text) to each row.

        Args:
            tokens: ids of the one row, or a list of ids for each row; an empty list leaves its row alone.
            all_logits: return the logits of every token instead of the last (one row only).

        Returns:
            `[B,V]` logits after the last token of each row (zeros for an empty one); `[n,V]` with `all_logits`.

        Raises:
            SemkvError: when a row would grow past `max_context`; nothing is appended then.
        """
        rows = self._rows(tokens)
        for row, ids in enumerate(rows):
            self._check_context(row, len(ids))
        if all_logits:
            if len(rows) != 1:
                raise SemkvError("logits of every token are returned for one row", where="prefill", got=len(rows))
            return np.concatenate([piece[0].copy() for piece in self._prefill_row(0, rows[0], every=True)])
        result: NDArray[np.float32] | None = None
        for row, ids in enumerate(rows):
            for piece in self._prefill_row(row, ids, every=False):
                last = piece[0, -1].copy()
            if len(ids):
                result = np.zeros((self.batch, len(last)), np.float32) if result is None else result
                result[row] = last
        if result is None:
            raise SemkvError("nothing to prefill", where="prefill", expected="at least one token", got="none")
        return result

    def step(self, tokens: Sequence[int] | NDArray[np.int64], active: NDArray[np.bool_] | None = None) -> Any:
        """Appends one token to each row.

        Args:
            tokens: `[B]` ids.
            active: `[B]`; rows that are not keep their state (their token is computed and forgotten).

        Returns:
            `[B,V]` logits, valid until the next call.
        """
        ids = np.asarray(tokens, np.int64).reshape(self.batch, 1)
        moving = np.ones(self.batch, bool) if active is None else active
        for row in np.flatnonzero(moving):
            self._check_context(int(row), 1)
        self._make_room(np.ones(self.batch, np.int64))
        logits = self.engine.run(ids, self.position[:, None], np.zeros((self.batch, 1), np.int64), self.length)
        for row in np.flatnonzero(moving):
            self._record(int(row), ids[row])
        return logits[:, 0]

    def end_turn(self) -> None:
        """Marks the end of a turn: methods that compress at turn ends do so now, down to budget x tokens seen."""
        if self.method.compress_at == "turn" and self.profile.budget < 1:
            target = np.ceil(self.profile.budget * self.position).astype(np.int64)
            self._compress(np.clip(target, self.method.sinks + 1, self.profile.target))

    def generate(
        self,
        tokens: Tokens | Sequence[Tokens],
        *,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        stop_ids: Sequence[int] = (),
        callback: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Prefills, then generates until a stop id, `max_new_tokens`, or the context's end.

        Every token returned is in the cache, so the next turn's text follows it directly. A stop id ends its row and
        is neither returned nor appended.

        Args:
            tokens: as for `prefill`.
            callback: called with (row, token id) for each token as it is chosen.

        Returns:
            New ids of each row.
        """
        sampler = sampler or Sampler()
        logits = self.prefill(tokens)
        active = np.array([len(ids) > 0 for ids in self._rows(tokens)])
        generated: list[list[int]] = [[] for _ in range(self.batch)]
        for _ in range(max_new_tokens):
            chosen = sampler(logits)
            for row in np.flatnonzero(active):
                if chosen[row] in stop_ids:
                    active[row] = False
                    continue
                generated[row].append(int(chosen[row]))
                if callback:
                    callback(int(row), int(chosen[row]))
                active[row] = self.position[row] < self.max_context
            if not active.any():
                break
            logits = self.step(chosen, active)
        return generated

    def _rows(self, tokens: Tokens | Sequence[Tokens]) -> list[NDArray[np.int64]]:
        single = len(tokens) == 0 or np.ndim(tokens[0]) == 0
        rows = [np.asarray(ids, np.int64) for ids in ([tokens] if single else tokens)]
        if len(rows) != self.batch:
            raise SemkvError(
                "wrong number of rows", where="prefill", expected=f"{self.batch} lists of tokens", got=len(rows)
            )
        return rows

    def _check_context(self, row: int, count: int) -> None:
        if self.position[row] + count > self.max_context:
            raise SemkvError(
                f"{count} more tokens do not fit the context",
                where=f"row {row}" if self.batch > 1 else "prompt",
                expected=f"at most {self.max_context} tokens in all",
                got=f"{self.position[row]} + {count}",
                fix="shorten the conversation, or build with a larger --max-context",
            )

    def _prefill_row(self, row: int, ids: NDArray[np.int64], *, every: bool) -> list[NDArray[np.float32]]:
        pieces = []
        for start in range(0, len(ids), self.profile.prefill_chunk):
            piece = ids[start : start + self.profile.prefill_chunk]
            room = np.zeros(self.batch, np.int64)
            room[row] = len(piece)
            self._make_room(room)
            positions = self.position[row] + np.arange(len(piece))
            index = np.arange(len(piece)) if every else np.array([len(piece) - 1])
            logits = self.engine.run(piece[None], positions[None], index[None], self.length[:, row : row + 1], row=row)
            self._record(row, piece)
            if every or start + len(piece) == len(ids):
                pieces.append(logits)
        return pieces

    def _record(self, row: int, ids: NDArray[np.int64]) -> None:
        """Counts tokens that were appended to a row, in every layer."""
        chunk = self._chunks[row].count(self._is_delimiter[ids])
        slots = self.length[:, row, None] + np.arange(len(ids))
        layer = np.arange(len(self.length))[:, None]
        self.slot_chunk[layer, row, :, slots] = chunk[None, :, None]
        self.slot_position[layer, row, :, slots] = (self.position[row] + np.arange(len(ids)))[None, :, None]
        self.length[:, row] += len(ids)
        self.position[row] += len(ids)

    def _make_room(self, count: NDArray[np.int64]) -> None:
        """Compresses the rows in which some layer has no room for `count[row]` more slots."""
        full = (self.length + count > self.engine.capacity).any(0)
        if not full.any():
            return
        if self.profile.budget == 1 or self.method.kind == "full":
            raise SemkvError(
                "the cache is full and the method does not compress",
                where=f"budget {self.profile.budget:g}",
                expected=f"at most {self.engine.capacity} tokens",
                fix="use a method that compresses, or a larger --max-context",
            )
        # A row that has room keeps everything: it is at or below a target of the whole capacity.
        self._compress(np.where(full, self.profile.target, self.engine.capacity))

    def _compress(self, target: NDArray[np.int64]) -> None:
        started = time.perf_counter()
        recent = np.array([self.method.recent_slots(int(slots)) for slots in target], np.int64)
        sinks, no_sinks = (np.array(count, np.int64) for count in (self.method.sinks, 0))
        state, inputs = [], []
        for layer, thresholds in enumerate(self._thresholds):
            # In a layer with a sliding window, how far apart slots are is how far apart tokens are, so that nothing
            # may be merged or taken from the middle: only its oldest slots go.
            windowed = self._windows[layer] > 0
            inputs.append(
                {
                    "target": target,
                    "recent": recent,
                    "sinks": no_sinks if windowed else sinks,
                    "thresholds": np.full_like(thresholds, NEVER) if windowed else thresholds,
                }
            )
            state.append(
                {
                    "length": self.length[layer],
                    "slot_position": self.slot_position[layer],
                    "slot_chunk": self.slot_chunk[layer],
                }
            )
        for layer, done in enumerate(self.engine.compress(state, inputs)):
            self.length[layer] = done.length
            self.slot_position[layer], self.slot_chunk[layer] = done.slot_position, done.slot_chunk
            self.stats.levels.update(done.level.tolist())
            self.stats.evicted += int(done.evicted.sum())
        self.stats.runs += 1
        self.stats.seconds += time.perf_counter() - started

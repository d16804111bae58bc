"""What a validation runs: three turns of prefill, decode and compression, the same for every graph that is compared.

Text comes from the bundle's own tokenizer and the calibration text; decoded tokens are the reference's greedy choices,
which every target is fed as well, so that runs stay comparable after a choice differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.behaviours import NexusTurns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.bundle.contract import Contract

PREFILL, STEP, END_TURN = 0, 1, 2
"""Values of an event's `kind`."""

TURNS = 3
STEPS = 8
"""Tokens decoded in each turn."""

DEFAULT_TOKENS = 2048
"""Tokens of a row at most, unless the user says otherwise: a large capacity would take minutes to overflow."""

RAGGED = 0.6
"""Share of the first row's prompts that every further row gets less than the one before."""


@dataclass(frozen=True)
class Event:
    """One call of a session.

    Attributes:
        name: for reports, such as "turn 2 step 3".
        kind: `PREFILL`, `STEP` or `END_TURN`.
        tokens: `[B,S]` int64, rows padded with zeros.
        count: `[B]` int64: how many of a row's tokens count; for a step 0 or 1.
    """

    name: str
    kind: int
    tokens: NDArray[np.int64]
    count: NDArray[np.int64]

    def feed(self) -> dict[str, NDArray[np.int64]]:
        """The event as a runner's feed_dict."""
        return {"kind": np.array(self.kind, np.int64), "tokens": self.tokens, "count": self.count}


@dataclass(frozen=True)
class Scenario:
    """Three turns for a batch.

    Attributes:
        prompts: `[turns][B]` token ids.
        steps: tokens decoded in each turn.
    """

    prompts: list[list[list[int]]]
    steps: int = STEPS

    @property
    def batch(self) -> int:
        return len(self.prompts[0])

    @property
    def tokens(self) -> int:
        """Tokens that the first row sees."""
        return sum(len(turn[0]) + self.steps for turn in self.prompts)

    def events(self, greedy: Callable[[], NDArray[np.int64]]) -> Iterator[Event]:
        """The events in order; made one by one, because a step's token is what the reference chose before.

        Args:
            greedy: returns the reference's choice `[B]` after the event before.
        """
        for number, prompts in enumerate(self.prompts, 1):
            count = np.array([len(row) for row in prompts], np.int64)
            tokens = np.zeros((self.batch, count.max()), np.int64)
            for row, ids in enumerate(prompts):
                tokens[row, : len(ids)] = ids
            yield Event(f"turn {number} prefill", PREFILL, tokens, count)
            for step in range(self.steps):
                active = np.ones(self.batch, np.int64)
                if number == 2 and step >= self.steps // 2:
                    # Further rows end their reply early: their state must stay as it is.
                    active[1:] = 0
                yield Event(f"turn {number} step {step + 1}", STEP, greedy()[:, None].copy(), active)
            nothing = np.zeros((self.batch, 0), np.int64)
            yield Event(f"turn {number} end", END_TURN, nothing, np.zeros(self.batch, np.int64))


def plan(text: Sequence[int], contract: Contract, *, batch: int, tokens: int | None) -> Scenario:
    """A scenario whose later prompts overflow the capacity midway, as far as `tokens` and the context allow.

    Args:
        text: ids to cut prompts from; read in a circle.
        contract: capacities, slots kept, prefill chunk and the context.
        tokens: tokens of the first row at most; None: `DEFAULT_TOKENS`.

    Raises:
        SemkvError: when `tokens` is too few for three turns.
    """
    added = max((each.most for each in contract.behaviours if isinstance(each, NexusTurns)), default=0)
    room = contract.max_context - TURNS * added
    limit = min(tokens if tokens is not None else DEFAULT_TOKENS, room) - TURNS * STEPS
    if limit < TURNS * 2:
        raise SemkvError(
            "too few tokens for three turns",
            where="--tokens",
            expected=f"at least {TURNS * (STEPS + 2)}",
            got=limit + TURNS * STEPS,
        )
    chunk, beyond = contract.prefill_chunk, contract.prefill_chunk // 2 + 1
    # The first turn fits, so that something is decoded before anything is compressed; the others overflow.
    first = max(min(2 * chunk + beyond, limit // 4), 2)
    capacity = contract.capacity
    if contract.compressors:
        kept = max(group.keep_slots for group in contract.cache.groups)
        third = min(capacity - kept + beyond, max(limit // 4, 2))
        second = min(capacity + beyond, limit - first - third)
    else:
        third = second = max(min(beyond, (min(limit, capacity - TURNS * STEPS) - first) // 2), 2)
    circle = np.resize(np.asarray(text, np.int64), limit * (batch + 1))
    prompts: list[list[list[int]]] = []
    start = 0
    for length in (first, second, third):
        rows: list[list[int]] = []
        for row in range(batch):
            count = max(int(length * RAGGED**row), 1)
            offset = start + row * limit
            rows.append(circle[offset : offset + count].tolist())
        prompts.append(rows)
        start += length
    return Scenario(prompts)


def bundle_text(root: Any) -> list[int]:
    """The calibration text in a bundle's own tokens."""
    from semkv_deploy.compiler.calibrate import calibration_text
    from semkv_deploy.runtime.tokens import load_tokenizer

    ids: list[int] = load_tokenizer(root).encode(calibration_text(), add_special_tokens=False)
    return ids

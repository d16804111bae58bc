"""Dialogues as tensors: which rows there are, at which positions, and which rows see which.

A dialogue `X, B1, N1, B2, N2, …` is kept as two runs of rows, its text (X and the bodies B) and its Nexus rows (N). The
order of rows in memory says nothing: positions and masks do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.sonic_adapter import Corner
from semkv_deploy.model.spread import Placement, spread_order

if TYPE_CHECKING:
    from torch import Tensor

PINNED, PAD = -1, -2
"""Turns of rows that belong to none: what is never compressed (X), and what fills a batch up."""


@dataclass(frozen=True)
class Dialogue:
    """Token ids of a dialogue.

    Attributes:
        pinned: X: a system prompt, or a text's first tokens.
        turns: B1, B2, …; the last is the open turn, which gets no Nexus rows.
        answers: (turn, start, end) of tokens that repeat what only an earlier turn says.
        source: the corpus.
    """

    pinned: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, int, int], ...] = ()
    source: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of text."""
        return len(self.pinned) + sum(map(len, self.turns))


class Batch(NamedTuple):
    """Dialogues side by side, filled up to the longest: T text rows and R Nexus rows, int64 unless it says otherwise.

    Attributes:
        ids: `[B,T]` tokens.
        turn: `[B,T]` turn of each text row, `PINNED` or `PAD`.
        position: `[B,T]` true positions, Nexus rows counted: a turn goes on after the Nexus rows of the one before.
        target: `[B,T]` the next token, -1 where there is none.
        answer: `[B,T]` 1 + number of the answer that the next token belongs to, 0 for none.
        nexus_turn, nexus_slot, nexus_position: `[B,R]`; a turn's rows follow its body, slots count from 0.
        nexus_token: `[B,R]` the token of the body that a spread row begins as, at whose position it stands; -1: none.
    """

    ids: Tensor
    turn: Tensor
    position: Tensor
    target: Tensor
    answer: Tensor
    nexus_turn: Tensor
    nexus_slot: Tensor
    nexus_position: Tensor
    nexus_token: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(tensor.to(device) for tensor in self))

    @property
    def tokens(self) -> int:
        """Text tokens, without what fills up."""
        return int((self.turn != PAD).sum())


def counts_for(lengths: Sequence[int], kept: float, k_max: int) -> list[int]:
    """Nexus rows for bodies of these lengths: ceil(kept x length), from 1 to `k_max`."""
    return [max(1, min(k_max, -int(-kept * length // 1))) for length in lengths]


def batch_of(
    dialogues: Sequence[Dialogue],
    counts: Sequence[Sequence[int]],
    placement: Placement = "appended",
    rank: Mapping[int, int] = MappingProxyType({}),
) -> Batch:
    """Rows of dialogues whose finished turns get `counts` Nexus rows.

    Args:
        rank: of common tokens, which spread rows begin as last.

    Raises:
        SemkvError: when a dialogue has one turn only, or its counts are not one for each finished turn.
    """
    columns: list[list[list[int]]] = [[] for _ in Batch._fields]
    for dialogue, of in zip(dialogues, counts, strict=True):
        for column, rows in zip(columns, _rows(dialogue, of, placement, rank), strict=True):
            column.append(rows)
    fills = {"turn": PAD, "nexus_turn": PAD, "target": -1, "nexus_token": -1}
    return Batch(*(_filled(column, fills.get(name, 0)) for name, column in zip(Batch._fields, columns, strict=True)))


def _filled(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=torch.int64)


def _rows(
    dialogue: Dialogue, counts: Sequence[int], placement: Placement, rank: Mapping[int, int]
) -> tuple[list[int], ...]:
    """One dialogue's lists, in the order of `Batch`."""
    if (
        len(dialogue.turns) < 2
        or len(counts) != len(dialogue.turns) - 1
        or min(counts) < 1
        or (
            placement == "spread"
            and any(count > len(body) for count, body in zip(counts, dialogue.turns, strict=False))
        )
    ):
        raise SemkvError(
            "a dialogue needs two turns at least, and a number of Nexus rows for each finished one",
            where=dialogue.source or None,
            expected=f"{max(1, len(dialogue.turns) - 1)} numbers of 1 or more",
            got=list(counts),
        )
    ids = list(dialogue.pinned)
    turn, position = [PINNED] * len(ids), list(range(len(ids)))
    starts, nexus_turn, nexus_slot = [], list[int](), list[int]()
    nexus_position, nexus_token = list[int](), list[int]()
    at = len(ids)
    for number, body in enumerate(dialogue.turns):
        starts.append(len(ids))
        ids += body
        turn += [number] * len(body)
        position += range(at, at + len(body))
        at += len(body)
        count = counts[number] if number < len(counts) else 0
        nexus_turn += [number] * count
        nexus_slot += range(count)
        if placement == "spread":
            chosen = spread_order(body, rank)[:count]
            nexus_position += [at - len(body) + place for place in chosen]
            nexus_token += [body[place] for place in chosen]
        else:
            nexus_position += range(at, at + count)
            nexus_token += [-1] * count
            at += count
    answer = [0] * len(ids)
    for number, (of, start, end) in enumerate(dialogue.answers, 1):
        # The row before a token predicts it.
        for row in range(starts[of] + start - 1, starts[of] + end - 1):
            answer[row] = number
    return ids, turn, position, [*ids[1:], -1], answer, nexus_turn, nexus_slot, nexus_position, nexus_token


class Sight(NamedTuple):
    """Which keys a query sees, as bool `[B,queries,keys]`."""

    text_text: Tensor
    text_nexus: Tensor
    nexus_text: Tensor
    nexus_nexus: Tensor

    @property
    def whole(self) -> Tensor:
        """`[B,T+R,T+R]`: text rows, then Nexus rows."""
        upper = torch.cat((self.text_text, self.text_nexus), -1)
        return torch.cat((upper, torch.cat((self.nexus_text, self.nexus_nexus), -1)), 1)


def sight(batch: Batch, corner: Corner = "causal") -> Sight:
    """What rows see once the bodies of finished turns have gone.

    A body row sees X, the Nexus rows of earlier turns and its own turn until itself. A Nexus row sees X, the Nexus rows
    of earlier turns, its whole turn, and of its turn's Nexus rows those until itself (`corner="full"`: all). Rows that
    fill up are seen by none, and see themselves, so that their softmax is defined.
    """
    turn, nexus_turn = batch.turn, batch.nexus_turn
    query, key = turn[:, :, None], turn[:, None, :]
    nexus_query, nexus_key = nexus_turn[:, :, None], nexus_turn[:, None, :]
    real = nexus_key != PAD
    slot_query, slot_key = batch.nexus_slot[:, :, None], batch.nexus_slot[:, None, :]
    within = (slot_key <= slot_query) | (corner == "full")
    nexus_nexus = real & ((nexus_key < nexus_query) | ((nexus_key == nexus_query) & within))
    return Sight(
        text_text=causal(batch) & ((key == PINNED) | (key == query)),
        text_nexus=real & (nexus_key < query),
        nexus_text=(nexus_query != PAD) & ((key == PINNED) | (key == nexus_query)),
        nexus_nexus=nexus_nexus | _itself(nexus_turn),
    )


def causal(batch: Batch) -> Tensor:
    """`[B,T,T]`: text rows see all text until themselves, as with a full cache."""
    rows = torch.arange(batch.turn.shape[1], device=batch.turn.device)
    real = (batch.turn != PAD)[:, None, :] & (batch.turn != PAD)[:, :, None]
    return (real & (rows[None, :] <= rows[:, None])) | _itself(batch.turn)


def _itself(turn: Tensor) -> Tensor:
    return torch.eye(turn.shape[1], dtype=torch.bool, device=turn.device)[None] & (turn == PAD)[:, :, None]


def window(batch: Batch, *, history: bool = True) -> Tensor:
    """`[B,T,T]`: StreamingLLM with as many slots as `sight` leaves: X, the newest tokens before the turn, the turn.

    The newest tokens are as many as the turn sees Nexus rows.

    Args:
        history: False drops them as well: nothing but X and the turn is left.
    """
    query, key = batch.turn[:, :, None], batch.turn[:, None, :]
    rows = torch.arange(batch.turn.shape[1], device=batch.turn.device)
    slots = sight(batch).text_nexus.sum(-1)[:, :, None] * history
    first = ((key != PAD) & (key < query)).sum(-1)[:, :, None]
    """Text rows before the query's turn; of a filling row it means nothing."""
    return causal(batch) & ((key == PINNED) | (key == query) | (rows[None, None, :] >= first - slots))

"""Masks and losses once more, in plain loops over rows: slow, and what the tensors are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from semkv_deploy.methods.sonic_adapter import Corner
from semkv_deploy.model.spread import Placement, rank_of, spread_order
from semkv_deploy.train.layout import PINNED, Dialogue

Rows = Sequence[Sequence[float]]


class Row(NamedTuple):
    """A row of a dialogue in its true order.

    Attributes:
        turn: `PINNED` for X.
        token: of text, or that a spread Nexus row begins as.
        slot: of a Nexus row, from 0.
    """

    kind: Literal["text", "nexus"]
    turn: int
    position: int
    token: int = -1
    slot: int = -1


def rows_of(
    dialogue: Dialogue, counts: Sequence[int], placement: Placement = "appended", common: Sequence[int] = ()
) -> list[Row]:
    """`X, B1, N1, B2, N2, …` one row after the other; positions are places, of spread rows those of their tokens."""
    rows = [Row("text", PINNED, place, token) for place, token in enumerate(dialogue.pinned)]
    seen = len(rows)
    for turn, body in enumerate(dialogue.turns):
        rows += [Row("text", turn, seen + place, token) for place, token in enumerate(body)]
        seen += len(body)
        for slot in range(counts[turn] if turn < len(counts) else 0):
            if placement == "spread":
                place = spread_order(body, rank_of(common))[slot]
                rows.append(Row("nexus", turn, seen - len(body) + place, body[place], slot))
            else:
                rows.append(Row("nexus", turn, seen + slot, slot=slot))
        if placement == "appended" and turn < len(counts):
            seen += counts[turn]
    return rows


def sees(query: Row, key: Row, corner: Corner = "causal") -> bool:
    """Whether a row sees another: the table of SONIC's segment mask."""
    if key.kind == "text" and key.turn == PINNED:
        return key.position <= query.position
    if key.turn < query.turn:
        return key.kind == "nexus"
    if key.turn > query.turn:
        return False
    if query.kind == "text":
        return key.kind == "text" and key.position <= query.position
    return key.kind == "text" or corner == "full" or key.slot <= query.slot


def streaming_sees(rows: Sequence[Row], query: Row, key: Row) -> bool:
    """Whether a text row sees another where StreamingLLM keeps X and as many newest tokens as there are Nexus rows."""
    if key.position > query.position or key.kind == "nexus":
        return False
    if key.turn in (PINNED, query.turn):
        return True
    slots = sum(row.kind == "nexus" and row.turn < query.turn for row in rows)
    between = sum(row.kind == "text" and row.turn < query.turn and row.position >= key.position for row in rows)
    return between <= slots


def heavy_slots(turns: Sequence[int], mass: Rows, of: int, slots: int, *, pinned: int = PINNED) -> set[int]:
    """Tokens of earlier turns that H2O keeps for turn `of`, in one KV head: half the newest, half the heaviest.

    Args:
        turns: of each text row. mass: `[rows][rows]`, what each row's queries looked at each row.
    """
    earlier = [row for row, turn in enumerate(turns) if turn != pinned and turn < of]
    recent = earlier[len(earlier) - min(slots // 2, len(earlier)) :]
    older = earlier[: len(earlier) - len(recent)]
    got = {row: sum(mass[query][row] for query, turn in enumerate(turns) if turn < of) for row in older}
    return {*recent, *sorted(older, key=lambda row: -got[row])[: slots - len(recent)]}


def _log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    total = math.log(sum(math.exp(value - top) for value in logits))
    return [value - top - total for value in logits]


def kd(teacher: Rows, student: Rows, weight: Sequence[float]) -> float:
    """Weighted mean over rows of sum p (log p - log q)."""
    total = 0.0
    for theirs, ours, by in zip(teacher, student, weight, strict=True):
        p, q = _log_softmax(theirs), _log_softmax(ours)
        total += by * sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    return total / sum(weight)


def ce(student: Rows, target: Sequence[int], weight: Sequence[float]) -> float:
    """Weighted mean over rows of -log q(target)."""
    total = sum(-by * _log_softmax(ours)[token] for ours, token, by in zip(student, target, weight, strict=True))
    return total / sum(weight)


def attn(teacher: Sequence[Rows], student: Sequence[Rows], earlier: Sequence[Sequence[bool]]) -> float:
    """Of masses `[heads][queries][turns]`: KL of their shares over the earlier turns, a mean over heads and queries."""
    values = []
    for theirs, ours in zip(teacher, student, strict=True):
        for p, q, asked in zip(theirs, ours, earlier, strict=True):
            a = [value for value, ask in zip(p, asked, strict=True) if ask]
            b = [value for value, ask in zip(q, asked, strict=True) if ask]
            if a:
                pairs = zip(a, b, strict=True)
                values.append(sum(x / sum(a) * math.log((x / sum(a)) / (y / sum(b))) for x, y in pairs))
    return sum(values) / len(values)


def reg(student: Sequence[Rows], earlier: Sequence[Sequence[bool]], floor: float) -> float:
    """Of masses `[heads][queries][turns]`: by how much those of queries with earlier turns fall short of the floor."""
    values = [
        max(0.0, floor - sum(mass)) for head in student for mass, asked in zip(head, earlier, strict=True) if any(asked)
    ]
    return sum(values) / len(values)


def match(teacher: Rows, student: Rows, weight: Sequence[float]) -> float:
    """Weighted squared error of outputs `[rows][values]`, over the teacher's weighted squared size."""
    wrong = size = 0.0
    for theirs, ours, by in zip(teacher, student, weight, strict=True):
        wrong += by * sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True))
        size += by * sum(value**2 for value in theirs)
    return wrong / size

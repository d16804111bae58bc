"""Dialogues in which facts are stated in early turns, and their sentences completed in later ones.

Answers are raw completions: a small base model does that, and answers no questions. Names and sentences of
`semkv_deploy evaluate` are left out, so that its tasks stay unseen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from semkv_deploy.train.layout import Dialogue

if TYPE_CHECKING:
    from semkv_deploy.train.data import Part

T = TypeVar("T")

NAMES = (
    "Alice", "Bernard", "Chloe", "Dennis", "Eleanor", "Frank", "Grace", "Hugo", "Isabel", "Julian", "Kate", "Leo",
    "Martha", "Nathan", "Olivia", "Peter", "Quentin", "Rachel", "Simon", "Teresa", "Ursula", "Victor", "Wendy",
    "Oscar", "Yvonne", "Albert", "Beatrice", "Charles", "Diana", "Edward", "Fiona", "George", "Harriet", "Ivan",
    "Jane", "Thomas",
)  # fmt: skip

CODES = (
    "The door code of {name} is", "The badge number of {name} is", "The room number of {name} is",
    "The account number of {name} is", "{name}'s phone extension is", "The ticket number of {name} is",
    "The parcel number of {name} is", "{name}'s secret number is",
)  # fmt: skip

WORDS = {
    "The favourite colour of {name} is": ("red", "green", "blue", "yellow", "purple", "orange", "black", "white"),
    "The home town of {name} is": ("Paris", "London", "Rome", "Chicago", "Boston", "Tokyo", "Cairo", "Delhi", "Lima"),
    "{name} travelled there by": ("train", "bus", "car", "boat", "plane", "bicycle", "horse", "ship"),
    "The profession of {name} is": ("doctor", "lawyer", "teacher", "farmer", "baker", "painter", "soldier", "nurse"),
    "The favourite animal of {name} is": ("lion", "tiger", "horse", "eagle", "wolf", "bear", "dolphin", "snake"),
    "The birthday of {name} is in": ("January", "March", "April", "June", "July", "August", "October", "December"),
}

HELD_OUT = 4
"""One of so many names and sentences, those at the ends of their lists, is kept for the held-out part."""


def recall_dialogue(
    draw: random.Random,
    part: Part,
    encode: Callable[[str], list[int]],
    prose: Sequence[int],
    lengths: Sequence[int],
    sinks: int,
) -> Dialogue:
    """A dialogue of turns of about these lengths.

    Every finished turn is prose with one to three facts at any place in it; the open turn, and sometimes one before,
    completes what earlier turns said. A fact is asked for once.

    Args:
        prose: ids of running text, `sinks + sum(lengths)` of them.
    """
    told: list[tuple[str, str]] = []
    used: set[str] = set()
    turns: list[tuple[int, ...]] = []
    answers: list[tuple[int, int, int]] = []
    at = sinks
    for number, length in enumerate(lengths):
        last = number == len(lengths) - 1
        pieces: list[tuple[list[int], list[int]]] = []
        if told and (last or draw.random() < 0.3):
            count = min(len(told), 3 if last else 1)
            asked = draw.sample(told, count)
            told = [fact for fact in told if fact not in asked]
            pieces += [(encode(f"\n{sentence}"), encode(f" {value}")) for sentence, value in asked]
        if not last:
            facts = [_fact(draw, part, used) for _ in range(draw.randint(1, 3))]
            told += facts
            pieces += [(encode(f"\n{sentence} {value}"), []) for sentence, value in facts]
            draw.shuffle(pieces)
        body, marked = _turn(draw, encode, prose[at : at + length], pieces)
        answers += [(number, start, end) for start, end in marked]
        turns.append(tuple(body))
        at += length
    return Dialogue(tuple(prose[:sinks]), tuple(turns), tuple(answers), source="recall")


def _turn(
    draw: random.Random,
    encode: Callable[[str], list[int]],
    prose: Sequence[int],
    pieces: Sequence[tuple[list[int], list[int]]],
) -> tuple[list[int], list[tuple[int, int]]]:
    """Prose with sentences put into it, as long as the prose was where they leave room; and where answers are."""
    end = encode(".\n")
    room = max(2, len(prose) - sum(len(asked) + len(answer) + len(end) for asked, answer in pieces))
    cuts = sorted(draw.randint(0, room) for _ in pieces)
    body: list[int] = []
    marked = []
    before = 0
    for cut, (asked, answer) in zip(cuts, pieces, strict=True):
        body += [*prose[before:cut], *asked]
        if answer:
            marked.append((len(body), len(body) + len(answer)))
        body += [*answer, *end]
        before = cut
    return body + list(prose[before:room]), marked


def _fact(draw: random.Random, part: Part, used: set[str]) -> tuple[str, str]:
    """A sentence that is new in the dialogue, and what completes it."""
    while True:
        name = draw.choice(_of(NAMES, part))
        if draw.random() < 0.5:
            sentence, value = draw.choice(_of(CODES, part)), str(draw.randrange(1000, 10_000))
        else:
            sentence, values = draw.choice(_of(tuple(WORDS.items()), part))
            value = draw.choice(values)
        sentence = sentence.format(name=name)
        if sentence not in used:
            used.add(sentence)
            return sentence, value


def _of(items: Sequence[T], part: Part) -> Sequence[T]:
    cut = len(items) - max(1, len(items) // HELD_OUT)
    return items[:cut] if part == "train" else items[cut:]

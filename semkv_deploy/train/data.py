"""Where dialogues come from: fetched texts cut into turns, chats, a user's JSON lines, and templates.

Every dialogue is a function of the seed, the part (`train`, `held-out`) and its number: a run that is resumed sees what
it would have seen, and processes that share a run take every so-manieth. A source's documents (chapters, chats) are
either trained on or held out, never both.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.texts import cache_folder
from semkv_deploy.model.spread import rank_of
from semkv_deploy.train.chats import read_chats
from semkv_deploy.train.layout import Dialogue
from semkv_deploy.train.recall import recall_dialogue

if TYPE_CHECKING:
    from semkv_deploy.train.recipe import Data, Source

Part = Literal["train", "held-out"]

TEXTS = {"prose": "prose.txt", "austen": "austen.txt", "sotu": "sotu.txt", "code": "code.txt"}
"""Running texts that `scripts/fetch.py` puts into the cache."""

CHATS = {"chat": "chat.jsonl", "mt-bench": "question.jsonl"}
"""Dialogues that it puts there."""

MADE = {"recall": "austen", "echo": "austen"}
"""Sources that are made, and the text they are made around."""

SINKS = 4
"""Tokens at a text's beginning that are never compressed: attention rests on them."""

_HEADING = re.compile(r"(?mi)^(?=chapter\b)")
_BLOCK = 20_000
"""Characters of a document of a text that has no chapters."""


class Dialogues:
    """Dialogues of a recipe's sources.

    Raises:
        SemkvError: when a source is unknown, its file is missing, or it has no multi-turn example in either part.
    """

    def __init__(self, data: Data, tokenizer: Any, *, seed: int) -> None:
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self._texts: dict[tuple[str, Part], list[list[int]]] = {}
        self._chats: dict[tuple[str, Part], list[Dialogue]] = {}
        self._ranks: dict[int, Mapping[int, int]] = {}
        for source in data.sources:
            self._load(source)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources."""
        return tuple(source.name for source in self._data.sources)

    def dialogue(self, part: Part, number: int, source: str | None = None) -> Dialogue:
        """Dialogue `number` of a part; from a source that its weight decides, or from the one named."""
        draw = random.Random(f"{self._seed} {part} {number} {source or ''}")
        weights = [each.weight for each in self._data.sources]
        name = source or draw.choices(self.names, weights)[0]
        makers: dict[str, Callable[[random.Random, Part], Dialogue]] = {"recall": self._recall, "echo": self._echo}
        if name in makers:
            return makers[name](draw, part)
        if (name, part) in self._chats:
            return draw.choice(self._chats[name, part])
        return self._cut(draw, part, name)

    def common(self, count: int) -> tuple[int, ...]:
        """The `count` most common tokens of what is trained on, each source's once, from the most common one on."""
        seen: Counter[int] = Counter()
        for (_, part), documents in self._texts.items():
            for ids in documents if part == "train" else ():
                seen.update(ids)
        for (_, part), dialogues in self._chats.items():
            for dialogue in dialogues if part == "train" else ():
                seen.update(dialogue.pinned)
                for turn in dialogue.turns:
                    seen.update(turn)
        return tuple(sorted(seen, key=lambda token: (-seen[token], token))[:count])

    def rank(self, count: int) -> Mapping[int, int]:
        """Of the `count` most common tokens, as spread rows are placed by it."""
        if count not in self._ranks:
            self._ranks[count] = rank_of(self.common(count) if count else ())
        return self._ranks[count]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _load(self, source: Source) -> None:
        text = MADE.get(source.name, source.name)
        if source.path is not None or source.name in CHATS:
            path = Path(source.path) if source.path is not None else cache_folder() / CHATS[source.name]
            where = f"data.sources: {source.name} ({path.name})"
            chats = read_chats(_read(path, source), self._tokenizer, where, most=self._data.tokens,
                               joined=source.path is None)  # fmt: skip
            for part, of in _split(chats, self._data.held_out).items():
                if not of:
                    raise _no_dialogue(where, part, f"{len(chats)} dialogues of two turns or more that fit")
                self._chats[source.name, part] = [replace(dialogue, source=source.name) for dialogue in of]
        elif text in TEXTS:
            path = cache_folder() / TEXTS[text]
            if (text, "train") not in self._texts:
                for part, of in _split(documents(_read(path, source)), self._data.held_out).items():
                    long = [ids for ids in map(self.encode, of) if len(ids) > self._data.tokens]
                    if not long:
                        where = f"data.sources: {source.name} ({path.name})"
                        raise _no_dialogue(where, part, f"{len(of)} documents, none of {self._data.tokens} tokens")
                    self._texts[text, part] = long
        else:
            raise SemkvError(
                "unknown source", where="data.sources", got=source.name,
                expected=" or ".join((*TEXTS, *CHATS, *MADE)), fix="or give it a path to JSON lines of dialogues",
            )  # fmt: skip

    def _window(self, draw: random.Random, part: Part, text: str, count: int) -> list[int]:
        """Consecutive tokens of one document; longer documents are taken more often."""
        of = self._texts[text, part]
        ids = draw.choices(of, [len(each) for each in of])[0]
        start = draw.randrange(len(ids) - count + 1)
        return ids[start : start + count]

    def _lengths(self, draw: random.Random, room: int) -> list[int]:
        """Lengths of a dialogue's turns, together `room` tokens at most."""
        low, high = self._data.turn
        count = max(2, min(draw.randint(*self._data.turns), room // low))
        lengths = [draw.randint(low, high) for _ in range(count)]
        if sum(lengths) > room:
            lengths = [max(2, length * room // sum(lengths)) for length in lengths]
        return lengths

    def _cut(self, draw: random.Random, part: Part, text: str) -> Dialogue:
        """A text cut into turns, wherever that falls."""
        lengths = self._lengths(draw, self._data.tokens - SINKS)
        ids = self._window(draw, part, text, SINKS + sum(lengths))
        turns, at = [], SINKS
        for length in lengths:
            turns.append(tuple(ids[at : at + length]))
            at += length
        return Dialogue(tuple(ids[:SINKS]), tuple(turns), source=text)

    def _echo(self, draw: random.Random, part: Part) -> Dialogue:
        """A text or facts in turns, then one of them said again, word for word."""
        made = self._recall(draw, part) if draw.random() < 0.5 else self._cut(draw, part, MADE["echo"])
        turns = made.turns[: max(1, len(made.turns) - 1)]
        again = draw.choice(turns)
        line = tuple(self.encode("\n"))
        return Dialogue(made.pinned, (*turns, (*line, *again[: self._data.turn[1]])), source="echo")

    def _recall(self, draw: random.Random, part: Part) -> Dialogue:
        lengths = self._lengths(draw, self._data.tokens - SINKS)
        prose = self._window(draw, part, MADE["recall"], SINKS + sum(lengths))
        return recall_dialogue(draw, part, self.encode, prose, lengths, SINKS)


def documents(text: str) -> list[str]:
    """A text's chapters; where it has none, blocks of it."""
    chapters = [chapter for chapter in _HEADING.split(text) if chapter.strip()]
    if len(chapters) > 4:
        return chapters
    return [text[start : start + _BLOCK] for start in range(0, len(text), _BLOCK)]


def _split(documents: Sequence[Any], held_out: float) -> dict[Part, list[Any]]:
    """Every so-manieth document is held out, the same whatever the seed."""
    every = max(2, round(1 / held_out))
    return {
        "train": [each for number, each in enumerate(documents) if number % every != every - 1],
        "held-out": [each for number, each in enumerate(documents) if number % every == every - 1],
    }


def _read(path: Path, source: Source) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        names = {file: name for name, file in {**TEXTS, **CHATS}.items()}
        fetch = None if source.path else f"fetch it: python scripts/fetch.py {names[path.name]}"
        raise SemkvError("no such file", where=f"data.sources: {source.name} ({path.name})", fix=fetch) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SemkvError(f"cannot be read as UTF-8 text: {error}", where=f"data.sources: {source.name}") from None


def _no_dialogue(where: str, part: Part, got: str) -> SemkvError:
    return SemkvError(
        f"training data with no multi-turn example in its {part} part", where=where, got=got,
        fix="give longer data, raise data.tokens or change data.held_out",
    )  # fmt: skip

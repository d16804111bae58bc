"""A reply that is being generated: what is shown of each token, and what of it the cache holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from semkv_deploy.runtime.tokens import StopFilter, TextStream


@dataclass(frozen=True)
class Reply:
    """A generated text.

    Attributes:
        text: without what stopped it.
        cached: the text of the tokens that the cache holds: `text`, or less, or with the beginning of a stop text.
        cancelled: whether it was broken off by the caller.
    """

    text: str
    cached: str
    cancelled: bool = False


class ReplyBuilder:
    """Turns chosen tokens into text, whole characters all, until an id or a text stops it.

    Args:
        stop_ids: ids that end the text; neither shown nor to be appended.
        stop: texts that end it; not shown. One that is a single special token is an id.

    Attributes:
        stopped: whether a stop text appeared; the token that completed it is not to be appended.
    """

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int] = (), stop: Sequence[str] = ()) -> None:
        self._ends = {*stop_ids, *_special_ids(tokenizer, stop)}
        self._pieces, self._shown = TextStream(tokenizer), StopFilter(stop)
        self._text: list[str] = []
        # Characters decoded, and how many of them are of tokens that the cache holds.
        self._decoded, self._appended = "", 0

    @property
    def stopped(self) -> bool:
        return self._shown.stopped

    def ends(self, token: int) -> bool:
        """Whether a token ends the text."""
        return token in self._ends

    def push(self, token: int) -> str:
        """Takes the next token, which does not end the text; returns what has become certain and may be shown."""
        piece = self._pieces.push(token)
        self._decoded += piece
        return self._show(self._shown.push(piece))

    def appended(self) -> None:
        """Notes that the cache holds what was pushed so far."""
        self._appended = len(self._decoded)

    def flush(self) -> str:
        """Ends the text; returns the rest that may be shown."""
        rest = self._pieces.flush()
        self._decoded += rest
        shown = self._show(self._shown.push(rest) + self._shown.flush())
        if not self.stopped:
            self._appended = len(self._decoded)
        return shown

    def reply(self, *, cancelled: bool = False) -> Reply:
        """The text so far, after `flush`."""
        return Reply("".join(self._text), self._decoded[: self._appended], cancelled)

    def _show(self, piece: str) -> str:
        self._text.append(piece)
        return piece


def _special_ids(tokenizer: Any, stop: Sequence[str]) -> set[int]:
    """Ids of stop texts that are special tokens, which decoded text does not show."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in stop]
    return {ids[0] for ids in encoded if len(ids) == 1 and ids[0] in special}

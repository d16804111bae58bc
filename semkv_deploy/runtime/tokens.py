"""Token ids to text and back, and to the chunks that delimiters cut them into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def load_tokenizer(root: Path) -> Any:
    """The tokenizer of a bundle, chat template included."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(root / "tokenizer"))


def delimiter_table(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.bool_]:
    """`[vocab]` bool, true for delimiters (ids past the model's vocabulary are ignored)."""
    table = np.zeros(vocab_size, bool)
    table[[token for token in token_ids if token < vocab_size]] = True
    return table


class ChunkCounter:
    """Numbers the chunks of a growing text: a chunk opens with the first token that is no delimiter after one that is.

    A delimiter has the number of the chunk it closes.
    """

    def __init__(self) -> None:
        self._chunk, self._after_delimiter = 0, False

    def count(self, delimiter: NDArray[np.bool_]) -> NDArray[np.int64]:
        """`slot_chunk` of the next tokens: `2 * chunk + (1 if delimiter)`; `delimiter` `[n]`, n > 0."""
        before = np.concatenate(([self._after_delimiter], delimiter[:-1]))
        chunk = self._chunk + np.cumsum(before & ~delimiter)
        self._chunk, self._after_delimiter = int(chunk[-1]), bool(delimiter[-1])
        return (2 * chunk + delimiter).astype(np.int64)


class TextStream:
    """Text of a growing token list, without halves of characters.

    Byte-level tokens can end inside a UTF-8 sequence, which decodes to U+FFFD until the rest arrives.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new

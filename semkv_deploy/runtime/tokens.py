"""Token ids to text and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(root: Path) -> Any:
    """The tokenizer of a bundle, chat template included."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(root / "tokenizer"))


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

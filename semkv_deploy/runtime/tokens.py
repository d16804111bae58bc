"""Token ids to text and back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.exported import TOKENIZER


def load_tokenizer(root: Path | str) -> Any:
    """The tokenizer of a bundle, chat template included, from files that are verified as they are read.

    Args:
        root: the bundle's directory; or one that `build` is writing, which has no manifest yet and is not verified.

    Raises:
        SemkvError: when a file of it is altered or not listed, or transformers cannot load it without running code.
    """
    from semkv_deploy.bundle import MANIFEST, Bundle
    from semkv_deploy.model.tokenizer import read_tokenizer

    root = Path(root)
    if not os.path.lexists(root / MANIFEST):
        return read_tokenizer(root / TOKENIZER)
    bundle = Bundle.open(root, only=[f"{TOKENIZER}/"])
    with tempfile.TemporaryDirectory() as folder:
        for name in bundle.manifest.files:
            if name.startswith(f"{TOKENIZER}/"):
                copy = Path(folder) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(bundle.read(name))
        return read_tokenizer(Path(folder) / TOKENIZER, where=root / TOKENIZER)


class TextStream:
    """Text of a growing token list, without parts of characters.

    A token can end inside a UTF-8 sequence, which decodes to U+FFFD until the rest arrives: to one, or to one a byte,
    three at most. Only the tokens since the last certain text are decoded again, with a few before them, because
    decoders treat a text's first token differently.
    """

    _CONTEXT = 6
    """Tokens decoded again before the new ones."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""
        """What of the text of `_tokens` was given out."""

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._tokens.append(token)
        text = self._decoded()
        certain = len(text)
        while certain > max(0, len(text) - 3) and text[certain - 1] == "\ufffd":
            certain -= 1
        new = text[len(self._shown) : certain]
        self._shown = text[: max(certain, len(self._shown))]
        if certain == len(text) and len(self._tokens) > 4 * self._CONTEXT:
            self._tokens = self._tokens[-self._CONTEXT :]
            self._shown = self._decoded()
        return new

    def flush(self) -> str:
        """The rest at the text's end: what stayed no whole character is U+FFFD."""
        text = self._decoded()
        rest, self._shown = text[len(self._shown) :], text
        return rest

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopFilter:
    """Passes text on until one of the stop texts appears, and holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that may be shown; nothing after a stop."""
        if self.stopped:
            return ""
        self._held += text
        found = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            shown, self._held = self._held[:found], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, at the text's end."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest beginning of `stop` with which the held text ends."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((length for length in lengths if self._held.endswith(stop[:length])), 0)


def check_ids(tokenizer: Any, ids: Sequence[int], vocab_size: int | None) -> list[int]:
    """The ids, after checking that the model has a row for each.

    Raises:
        SemkvError: naming the token that it has not.
    """
    beyond = next((token for token in ids if vocab_size is not None and token >= vocab_size), None)
    if beyond is not None:
        raise SemkvError(
            "the text has a token that the model does not have",
            where="prompt",
            expected=f"ids below {vocab_size}",
            got=f"{tokenizer.convert_ids_to_tokens(beyond)} ({beyond})",
        )
    return [int(token) for token in ids]


def checked_text(text: str, where: str) -> str:
    """Text from the command line or a file name, after checking that its bytes were UTF-8.

    Raises:
        SemkvError: with the first byte that is not.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise not_utf8(where, byte, error.start) from None
    return text


def decoded_text(data: bytes, where: str) -> str:
    """Bytes as UTF-8 text, without a byte-order mark.

    Raises:
        SemkvError: with the first byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(where, data[error.start], error.start) from None


def not_utf8(where: str, byte: int, offset: int) -> SemkvError:
    """The error for text in another encoding."""
    return SemkvError(
        "not UTF-8 text",
        where=where,
        got=f"byte {byte:#04x} at offset {offset}",
        fix="convert it to UTF-8 (iconv -t UTF-8)",
    )
